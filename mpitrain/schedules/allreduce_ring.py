"""Ring all-reduce: a reduce-scatter phase, then an allgather phase.

Terms: the buffer is cut into `size` chunks, one per rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

from mpitrain.schedules.algorithm import Algorithm
from mpitrain.schedules.ring import ring_allgather_rounds, ring_reduce_scatter_rounds
from mpitrain.schedules.rounds import Round

__all__ = ["ALGORITHM", "allreduce_ring"]


def allreduce_ring(rank: int, size: int) -> Iterator[Round]:
    """Yield the rounds of `rank`, all with its two neighbours on the ring.

    Requires: a commutative operation. Any `size`.
    Cost: 2(p-1) rounds; each rank sends 2(p-1)/p * n bytes, which is the least possible.
    Determinism: same bits on all ranks, as each chunk is reduced once and then copied.
    Source: Patarasuk and Yuan, JPDC 69(2):117-124, 2009, doi:10.1016/j.jpdc.2008.09.002.
    """
    yield from ring_reduce_scatter_rounds(rank, size)
    yield from ring_allgather_rounds(rank, size)


ALGORITHM = Algorithm(
    collective="allreduce",
    name="ring",
    schedule=allreduce_ring,
    num_chunks=lambda size, _: size,
    rounds=lambda size, _: 2 * (size - 1),
    volume=lambda size, _: Fraction(2 * (size - 1), size),
    rounds_formula="2(p-1)",
    volume_formula="2(p-1)/p",
    restrictions="commutative operation",
    source="Patarasuk and Yuan, JPDC 69(2):117-124, 2009, doi:10.1016/j.jpdc.2008.09.002",
    is_symmetric=True,
)
