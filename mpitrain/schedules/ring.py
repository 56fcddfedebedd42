"""Phases on a ring: every rank sends one chunk to its right and gets one from its left."""

from __future__ import annotations

from collections.abc import Iterator

from mpitrain.schedules.rounds import Receive, Round, Send

__all__ = ["ring_allgather_rounds", "ring_reduce_scatter_rounds"]


def ring_reduce_scatter_rounds(rank: int, size: int) -> Iterator[Round]:
    """Yield `size - 1` rounds after which `rank` holds chunk `rank` fully reduced."""
    # A chunk makes size - 1 hops and must end at the rank of its number, so chunk c
    # starts at rank c + 1: this rank begins with chunk rank - 1.
    return _ring_rounds(rank, size, first=rank - 1, reduce=True)


def ring_allgather_rounds(rank: int, size: int) -> Iterator[Round]:
    """Yield `size - 1` rounds that bring chunk `rank` of every rank to all ranks."""
    return _ring_rounds(rank, size, first=rank, reduce=False)


def _ring_rounds(rank: int, size: int, *, first: int, reduce: bool) -> Iterator[Round]:
    left, right = (rank - 1) % size, (rank + 1) % size
    for round_index in range(size - 1):
        # What arrives in a round is passed on in the next one.
        sent = (first - round_index) % size
        received = (sent - 1) % size
        yield Round(
            sends=(Send(right, sent, sent + 1),),
            receives=(Receive(left, received, received + 1, reduce),),
        )
