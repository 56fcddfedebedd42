"""Ring allgather: every chunk travels once around the ring.

Terms: the gathered buffer consists of `size` chunks, one from each rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

from mpitrain.schedules.algorithm import Algorithm
from mpitrain.schedules.ring import ring_allgather_rounds
from mpitrain.schedules.rounds import Round

__all__ = ["ALGORITHM", "allgather_ring"]


def allgather_ring(rank: int, size: int) -> Iterator[Round]:
    """Yield the rounds of `rank`, which starts with chunk `rank` only.

    Requires: nothing. Any `size`.
    Cost: p-1 rounds; each rank sends (p-1)/p * n bytes, which is the least possible.
    Source: Chan, Heimlich, Purkayastha and van de Geijn, CCPE 19(13):1749-1783, 2007,
        doi:10.1002/cpe.1206 (the bucket algorithm).
    """
    return ring_allgather_rounds(rank, size)


ALGORITHM = Algorithm(
    collective="allgather",
    name="ring",
    schedule=allgather_ring,
    num_chunks=lambda size, _: size,
    rounds=lambda size, _: size - 1,
    volume=lambda size, _: Fraction(size - 1, size),
    rounds_formula="p-1",
    volume_formula="(p-1)/p",
    restrictions="none",
    source=("Chan, Heimlich, Purkayastha and van de Geijn, CCPE 19(13):1749-1783, 2007, doi:10.1002/cpe.1206"),
    is_symmetric=True,
)
