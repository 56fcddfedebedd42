"""What a time means as a bandwidth: the definitions of nccl-tests, by which results of other tools can be compared.

Terms: n is the size of the full buffer in bytes: what an all-reduce or a broadcast works on, what an allgather
collects, what a reduce-scatter reduces, and the send buffer of one rank in an all-to-all. algbw is n / time. busbw is
algbw times the part of n that must pass through each rank's port in each direction whatever the algorithm, so that it
can be compared with the bandwidth of the hardware, and among different numbers of ranks.
"""

from __future__ import annotations

__all__ = ["COLLECTIVES", "algbw_bytes_per_s", "busbw_bytes_per_s"]

COLLECTIVES = ("allreduce", "broadcast", "reduce_scatter", "allgather", "alltoall")
"""What can be measured."""


def algbw_bytes_per_s(nbytes: int, seconds: float) -> float:
    """Return n / time."""
    return nbytes / seconds


def busbw_bytes_per_s(collective: str, nbytes: int, seconds: float, size: int) -> float:
    """Return algbw x 2(p-1)/p for an all-reduce, x 1 for a broadcast, and x (p-1)/p for the others.

    Raises:
        ValueError: No such collective.
    """
    if collective not in COLLECTIVES:
        raise ValueError(f"collective: has no bandwidth, got {collective!r}; use one of {', '.join(COLLECTIVES)}")
    factor = {"allreduce": 2 * (size - 1) / size, "broadcast": 1.0}.get(collective, (size - 1) / size)
    return algbw_bytes_per_s(nbytes, seconds) * factor
