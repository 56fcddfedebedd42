"""Bruck's allgather phase, which needs ceil(log2 p) rounds for any size."""

from __future__ import annotations

from collections.abc import Iterator

from mpitrain.schedules.rotation import wrapped_ranges
from mpitrain.schedules.rounds import Receive, Round, Send

__all__ = ["bruck_rounds"]


def bruck_rounds(rank: int, size: int) -> Iterator[Round]:
    """Yield rounds that bring chunk `rank` of every rank to all ranks."""
    # Every rank holds the `held` chunks from its own on (modulo size), so the ones that
    # follow are with the rank `held` further on.
    held = 1
    while held < size:
        count = min(held, size - held)
        dest, source = (rank - held) % size, (rank + held) % size
        yield Round(
            sends=tuple(Send(dest, *chunks) for chunks in wrapped_ranges(rank, count, size)),
            receives=tuple(Receive(source, *chunks) for chunks in wrapped_ranges(source, count, size)),
        )
        held += count
