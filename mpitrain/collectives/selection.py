"""Which algorithms a communicator has; `choice` says which of them `auto` stands for."""

from __future__ import annotations

import dataclasses

from mpitrain.schedules import ALGORITHMS

__all__ = [
    "DIRECT",
    "HIERARCHICAL",
    "LEAST_READ_NBYTES",
    "NATIVE",
    "Available",
    "check_algorithm",
    "choose_num_segments",
    "known_algorithms",
]

NATIVE = "native"
# In memory that the ranks of a node share: on one node, and on several.
DIRECT = "direct"
HIERARCHICAL = "hierarchical"
# Ordinary arrays from here on are read by the peers where that can be; what is smaller passes through staging memory
# in less time than it takes to ask for it.
LEAST_READ_NBYTES = 2 << 20

_IN_MEMORY = {
    DIRECT: ("allreduce", "allgather", "broadcast", "reduce", "reduce_scatter"),
    HIERARCHICAL: ("allreduce",),
}
_MOST_SEGMENTS = 64


@dataclasses.dataclass(frozen=True, slots=True)
class Available:
    """What can be run on a communicator besides the schedules; the same on all of its ranks.

    Attributes:
        has_native: Whether the MPI library has collectives.
        shared: The algorithm in memory that the ranks of a node share, None without such memory.
        reads_memory: Whether the ranks, all of one node, can also read each other's ordinary arrays.
    """

    has_native: bool = True
    shared: str | None = None
    reads_memory: bool = False


def known_algorithms(collective: str, available: Available) -> list[str]:
    """Return the names that may be asked for."""
    shared = [available.shared] if available.shared and collective in _IN_MEMORY[available.shared] else []
    return ["auto", *([NATIVE] if available.has_native else []), *shared, *ALGORITHMS[collective]]


def check_algorithm(collective: str, name: str, available: Available) -> None:
    """Refuse an unknown name.

    Raises:
        ValueError: The message lists the known algorithms.
    """
    known = known_algorithms(collective, available)
    if name not in known:
        raise ValueError(f"algorithm of {collective}: unknown, got {name!r}; use one of {', '.join(known)}")


def choose_num_segments(nbytes: int, segment_nbytes: int) -> int:
    """Return into how many parts an algorithm that pipelines by itself cuts a buffer."""
    return max(1, min(_MOST_SEGMENTS, nbytes // segment_nbytes))
