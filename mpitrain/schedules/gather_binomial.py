"""Binomial gather: the chunks of growing subtrees meet at the root.

Terms: the gathered buffer consists of `size` chunks, one from each rank; `vrank` is the
rank counted from the root.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

from mpitrain.schedules.algorithm import Algorithm
from mpitrain.schedules.binomial import binomial_up_rounds, ceil_log2, subtree_chunks
from mpitrain.schedules.rotation import rotate_peers_and_chunks, to_vrank
from mpitrain.schedules.rounds import Round

__all__ = ["ALGORITHM", "gather_binomial"]


def gather_binomial(rank: int, size: int, root: int) -> Iterator[Round]:
    """Yield the rounds of `rank`, which starts with chunk `rank` only.

    Requires: nothing. Any `size` and `root`. Interior ranks hold chunks of their subtree.
    Cost: with m = ceil(log2 p), m rounds, the least possible; the rank with the largest
        subtree below the root sends max(floor(2^(m-2)), p - 2^(m-1))/p * n bytes (p > 1).
    Source: Chan, Heimlich, Purkayastha and van de Geijn, CCPE 19(13):1749-1783, 2007,
        doi:10.1002/cpe.1206 (the minimum spanning tree algorithm).
    """
    vrank = to_vrank(rank, root, size)
    rounds = binomial_up_rounds(vrank, size, subtree_chunks, reduce=False)
    return rotate_peers_and_chunks(rounds, root, size)


def _volume(size: int, _: int) -> Fraction:
    if size == 1:
        return Fraction(0)
    # The subtree of vrank 2^(m-1) may be cut short by the size, the one of 2^(m-2) is not.
    m = ceil_log2(size)
    return Fraction(max(2**m // 4, size - 2 ** (m - 1)), size)


ALGORITHM = Algorithm(
    collective="gather",
    name="binomial",
    schedule=gather_binomial,
    num_chunks=lambda size, _: size,
    rounds=lambda size, _: ceil_log2(size),
    volume=_volume,
    rounds_formula="ceil(log2 p)",
    volume_formula="max(floor(2^(m-2)), p - 2^(m-1))/p; m = ceil(log2 p), p > 1",
    restrictions="none",
    source=("Chan, Heimlich, Purkayastha and van de Geijn, CCPE 19(13):1749-1783, 2007, doi:10.1002/cpe.1206"),
    takes_root=True,
)
