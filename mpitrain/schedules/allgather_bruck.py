"""Bruck allgather: the gathered part doubles in every round, on any size.

Terms: the gathered buffer consists of `size` chunks, one from each rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

from mpitrain.schedules.algorithm import Algorithm
from mpitrain.schedules.binomial import ceil_log2
from mpitrain.schedules.bruck import bruck_rounds
from mpitrain.schedules.rounds import Round

__all__ = ["ALGORITHM", "allgather_bruck"]


def allgather_bruck(rank: int, size: int) -> Iterator[Round]:
    """Yield the rounds of `rank`, which starts with chunk `rank` only.

    Requires: nothing. Any `size`.
    Cost: ceil(log2 p) rounds; each rank sends (p-1)/p * n bytes. Both are the least possible.
    Source: Bruck, Ho, Kipnis, Upfal and Weathersby, IEEE TPDS 8(11):1143-1156, 1997,
        doi:10.1109/71.642949. We place chunks at once where they belong, so that the final rotation
        is not needed, at the price of two messages where a range wraps around.
    """
    return bruck_rounds(rank, size)


ALGORITHM = Algorithm(
    collective="allgather",
    name="bruck",
    schedule=allgather_bruck,
    num_chunks=lambda size, _: size,
    rounds=lambda size, _: ceil_log2(size),
    volume=lambda size, _: Fraction(size - 1, size),
    rounds_formula="ceil(log2 p)",
    volume_formula="(p-1)/p",
    restrictions="none",
    source=("Bruck, Ho, Kipnis, Upfal and Weathersby, IEEE TPDS 8(11):1143-1156, 1997, doi:10.1109/71.642949"),
    is_symmetric=True,
)
