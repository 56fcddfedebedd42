"""Dissemination barrier: word of who has arrived doubles in every round.

Terms: there are no chunks; a message is a bare signal.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

from mpitrain.schedules.algorithm import Algorithm
from mpitrain.schedules.binomial import ceil_log2
from mpitrain.schedules.rounds import Receive, Round, Send

__all__ = ["ALGORITHM", "barrier_dissemination"]


def barrier_dissemination(rank: int, size: int) -> Iterator[Round]:
    """Yield the rounds of `rank`; after the last one every rank has begun the first.

    Requires: nothing. Any `size`.
    Cost: ceil(log2 p) rounds, the least possible; no data.
    Source: Hensgen, Finkel and Manber, IJPP 17(1):1-17, 1988, doi:10.1007/BF01379320.
    """
    for k in range(ceil_log2(size)):
        dest, source = (rank + 2**k) % size, (rank - 2**k) % size
        yield Round(sends=(Send(dest, 0, 0),), receives=(Receive(source, 0, 0),))


ALGORITHM = Algorithm(
    collective="barrier",
    name="dissemination",
    schedule=barrier_dissemination,
    num_chunks=lambda _size, _: 0,
    rounds=lambda size, _: ceil_log2(size),
    volume=lambda _size, _: Fraction(0),
    rounds_formula="ceil(log2 p)",
    volume_formula="0",
    restrictions="none",
    source="Hensgen, Finkel and Manber, IJPP 17(1):1-17, 1988, doi:10.1007/BF01379320",
    is_symmetric=True,
)
