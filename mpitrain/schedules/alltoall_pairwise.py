"""Pairwise all-to-all: in every round each rank serves one other rank.

Terms: chunk d, below `size`, is what this rank sends to rank d; chunk `size + s` is where
the one from rank s arrives. So a message has other chunk numbers at its two ends.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

from mpitrain.schedules.algorithm import Algorithm
from mpitrain.schedules.rounds import Receive, Round, Send

__all__ = ["ALGORITHM", "alltoall_pairwise"]


def alltoall_pairwise(rank: int, size: int) -> Iterator[Round]:
    """Yield the rounds of `rank`; the caller places its own part, chunk `size + rank`.

    Requires: nothing. Any `size`.
    Cost: p-1 rounds; each rank sends (p-1)/p * n bytes, the least possible, where n is the
        send buffer of one rank.
    Source: Thakur, Rabenseifner and Gropp, IJHPCA 19(1):49-66, 2005,
        doi:10.1177/1094342005051521.
    """
    for distance in range(1, size):
        dest = (rank + distance) % size
        source = (rank - distance) % size
        yield Round(
            sends=(Send(dest, dest, dest + 1),),
            receives=(Receive(source, size + source, size + source + 1),),
        )


ALGORITHM = Algorithm(
    collective="alltoall",
    name="pairwise",
    schedule=alltoall_pairwise,
    num_chunks=lambda size, _: 2 * size,
    rounds=lambda size, _: size - 1,
    volume=lambda size, _: Fraction(size - 1, size),
    rounds_formula="p-1",
    volume_formula="(p-1)/p",
    restrictions="none",
    source=("Thakur, Rabenseifner and Gropp, IJHPCA 19(1):49-66, 2005, doi:10.1177/1094342005051521"),
    is_symmetric=True,
    renumbers_chunks=True,
)
