"""Ring reduce-scatter: partial sums travel once around the ring.

Terms: the buffer is cut into `size` chunks, one per rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

from mpitrain.schedules.algorithm import Algorithm
from mpitrain.schedules.ring import ring_reduce_scatter_rounds
from mpitrain.schedules.rounds import Round

__all__ = ["ALGORITHM", "reduce_scatter_ring"]


def reduce_scatter_ring(rank: int, size: int) -> Iterator[Round]:
    """Yield the rounds of `rank`, which ends with chunk `rank` fully reduced.

    Requires: a commutative operation. Any `size`.
    Cost: p-1 rounds; each rank sends (p-1)/p * n bytes, which is the least possible.
    Source: Patarasuk and Yuan, JPDC 69(2):117-124, 2009, doi:10.1016/j.jpdc.2008.09.002
        (first phase).
    """
    return ring_reduce_scatter_rounds(rank, size)


ALGORITHM = Algorithm(
    collective="reduce_scatter",
    name="ring",
    schedule=reduce_scatter_ring,
    num_chunks=lambda size, _: size,
    rounds=lambda size, _: size - 1,
    volume=lambda size, _: Fraction(size - 1, size),
    rounds_formula="p-1",
    volume_formula="(p-1)/p",
    restrictions="commutative operation",
    source="Patarasuk and Yuan, JPDC 69(2):117-124, 2009, doi:10.1016/j.jpdc.2008.09.002",
    is_symmetric=True,
)
