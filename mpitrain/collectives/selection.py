"""Which algorithm `auto` stands for.

The choice depends only on what all ranks share, so it is the same on all of them by construction.
"""

from __future__ import annotations

from mpitrain.schedules import ALGORITHMS, find_algorithm

__all__ = ["NATIVE", "check_algorithm", "choose_algorithm", "choose_num_segments", "known_algorithms"]

NATIVE = "native"

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
_MOST_SEGMENTS = 64


def known_algorithms(collective: str, *, has_native: bool = True) -> list[str]:
    """Return the names that may be asked for."""
    return ["auto", *([NATIVE] if has_native else []), *ALGORITHMS[collective]]


def check_algorithm(collective: str, name: str, *, has_native: bool) -> None:
    """Refuse an unknown name.

    Raises:
        ValueError: The message lists the known algorithms.
    """
    known = known_algorithms(collective, has_native=has_native)
    if name not in known:
        raise ValueError(f"algorithm of {collective}: unknown, got {name!r}; use one of {', '.join(known)}")


def choose_algorithm(collective: str, name: str, nbytes: int, *, has_native: bool) -> str:
    """Return the algorithm to run: `name` itself unless that is "auto".

    Args:
        collective: Such as "allreduce".
        name: What the caller asked for.
        nbytes: Bytes of the full buffer; same on every rank.
        has_native: Whether the MPI library's collectives are available.

    Raises:
        ValueError: No such algorithm.
    """
    check_algorithm(collective, name, has_native=has_native)
    if name != "auto":
        return name
    if has_native and nbytes < _NATIVE_NBYTES:
        return NATIVE
    for limit, choice in _BY_SIZE.get(collective, ()):
        if limit is None or nbytes <= limit:
            return choice
    return find_algorithm(collective, _ALWAYS[collective]).name


def choose_num_segments(nbytes: int, segment_nbytes: int) -> int:
    """Return into how many parts an algorithm that pipelines by itself cuts a buffer."""
    return max(1, min(_MOST_SEGMENTS, nbytes // segment_nbytes))
