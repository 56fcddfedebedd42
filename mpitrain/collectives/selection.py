"""Which algorithm `auto` stands for.

The choice depends only on what all ranks share, so it is the same on all of them by construction.
"""

from __future__ import annotations

import dataclasses

from mpitrain.schedules import ALGORITHMS, find_algorithm

__all__ = [
    "DIRECT",
    "HIERARCHICAL",
    "NATIVE",
    "Available",
    "check_algorithm",
    "choose_algorithm",
    "choose_num_segments",
    "known_algorithms",
]

NATIVE = "native"
# In memory that the ranks of a node share: on one node, and on several.
DIRECT = "direct"
HIERARCHICAL = "hierarchical"

# For collectives whose best algorithm changes with the size of the buffer: (up to so many bytes, algorithm).
_BY_SIZE = {
    "allreduce": ((64 << 10, "recursive_doubling"), (1 << 20, "halving_doubling"), (None, "ring")),
    "reduce_scatter": ((1 << 20, "recursive_halving"), (None, "ring")),
    "allgather": ((256 << 10, "bruck"), (None, "ring")),
    "broadcast": ((256 << 10, "binomial"), (None, "scatter_allgather")),
}
_ALWAYS = {
    "reduce": "binomial",
    "gather": "binomial",
    "scatter": "binomial",
    "alltoall": "pairwise",
    "barrier": "dissemination",
}
# Below this the MPI library's own collective costs less than the Python that runs a schedule.
_NATIVE_NBYTES = 512 << 10
# The same for a buffer that the node shares, of which nothing needs to be copied.
_NATIVE_SHARED_NBYTES = 32 << 10
_MOST_SEGMENTS = 64


@dataclasses.dataclass(frozen=True, slots=True)
class Available:
    """What can be run on a communicator besides the schedules; the same on all of its ranks.

    Attributes:
        has_native: Whether the MPI library has collectives.
        shared: The all-reduce in memory that the ranks of a node share, None without such memory.
    """

    has_native: bool = True
    shared: str | None = None


def known_algorithms(collective: str, available: Available) -> list[str]:
    """Return the names that may be asked for."""
    shared = [available.shared] if available.shared and collective == "allreduce" else []
    return ["auto", *([NATIVE] if available.has_native else []), *shared, *ALGORITHMS[collective]]


def check_algorithm(collective: str, name: str, available: Available) -> None:
    """Refuse an unknown name.

    Raises:
        ValueError: The message lists the known algorithms.
    """
    known = known_algorithms(collective, available)
    if name not in known:
        raise ValueError(f"algorithm of {collective}: unknown, got {name!r}; use one of {', '.join(known)}")


def choose_algorithm(collective: str, name: str, nbytes: int, available: Available, *, in_window: bool = False) -> str:
    """Return the algorithm to run: `name` itself unless that is "auto".

    Args:
        collective: Such as "allreduce".
        name: What the caller asked for.
        nbytes: Bytes of the full buffer; same on every rank.
        available: Same on every rank.
        in_window: Whether the buffer lies in shared memory; same on every rank.

    Raises:
        ValueError: No such algorithm.
    """
    check_algorithm(collective, name, available)
    if name != "auto":
        return name
    if available.has_native and nbytes < (_NATIVE_SHARED_NBYTES if in_window else _NATIVE_NBYTES):
        return NATIVE
    if in_window or available.shared == HIERARCHICAL:
        names = known_algorithms(collective, available)
        if available.shared in names:
            return str(available.shared)
    for limit, choice in _BY_SIZE.get(collective, ()):
        if limit is None or nbytes <= limit:
            return choice
    return find_algorithm(collective, _ALWAYS[collective]).name


def choose_num_segments(nbytes: int, segment_nbytes: int) -> int:
    """Return into how many parts an algorithm that pipelines by itself cuts a buffer."""
    return max(1, min(_MOST_SEGMENTS, nbytes // segment_nbytes))
