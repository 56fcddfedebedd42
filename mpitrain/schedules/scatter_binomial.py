"""Binomial scatter: the chunks of shrinking subtrees leave the root.

Terms: the scattered buffer consists of `size` chunks, one for each rank; `vrank` is the
rank counted from the root.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

from mpitrain.schedules.algorithm import Algorithm
from mpitrain.schedules.binomial import binomial_down_rounds, ceil_log2, subtree_chunks
from mpitrain.schedules.rotation import rotate_peers_and_chunks, to_vrank
from mpitrain.schedules.rounds import Round

__all__ = ["ALGORITHM", "scatter_binomial"]


def scatter_binomial(rank: int, size: int, root: int) -> Iterator[Round]:
    """Yield the rounds of `rank`, which ends with chunk `rank`.

    Requires: nothing. Any `size` and `root`. Interior ranks hold chunks of their subtree.
    Cost: ceil(log2 p) rounds, the least possible; the root sends (p-1)/p * n bytes.
    Source: Chan, Heimlich, Purkayastha and van de Geijn, CCPE 19(13):1749-1783, 2007,
        doi:10.1002/cpe.1206 (the minimum spanning tree algorithm).
    """
    vrank = to_vrank(rank, root, size)
    rounds = binomial_down_rounds(vrank, size, subtree_chunks)
    return rotate_peers_and_chunks(rounds, root, size)


ALGORITHM = Algorithm(
    collective="scatter",
    name="binomial",
    schedule=scatter_binomial,
    num_chunks=lambda size, _: size,
    rounds=lambda size, _: ceil_log2(size),
    volume=lambda size, _: Fraction(size - 1, size),
    rounds_formula="ceil(log2 p)",
    volume_formula="(p-1)/p",
    restrictions="none",
    source=("Chan, Heimlich, Purkayastha and van de Geijn, CCPE 19(13):1749-1783, 2007, doi:10.1002/cpe.1206"),
    takes_root=True,
)
