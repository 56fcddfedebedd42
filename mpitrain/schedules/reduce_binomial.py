"""Binomial reduce: partial results of growing subtrees meet at the root.

Terms: the buffer is one chunk; `vrank` is the rank counted from the root.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

from mpitrain.schedules.algorithm import Algorithm
from mpitrain.schedules.binomial import binomial_up_rounds, ceil_log2, one_chunk
from mpitrain.schedules.rotation import rotate_peers, to_vrank
from mpitrain.schedules.rounds import Round

__all__ = ["ALGORITHM", "reduce_binomial"]


def reduce_binomial(rank: int, size: int, root: int) -> Iterator[Round]:
    """Yield the rounds of `rank`; the root ends with the full reduction.

    Requires: a commutative operation (for root 0 an associative one is enough: each
        parent joins its own vranks with the ones that follow them). Any `size` and `root`.
    Cost: ceil(log2 p) rounds, the least possible; all ranks but the root send n bytes.
    Source: Chan, Heimlich, Purkayastha and van de Geijn, CCPE 19(13):1749-1783, 2007,
        doi:10.1002/cpe.1206 (the minimum spanning tree algorithm).
    """
    vrank = to_vrank(rank, root, size)
    rounds = binomial_up_rounds(vrank, size, one_chunk, reduce=True)
    return rotate_peers(rounds, root, size)


ALGORITHM = Algorithm(
    collective="reduce",
    name="binomial",
    schedule=reduce_binomial,
    num_chunks=lambda _size, _: 1,
    rounds=lambda size, _: ceil_log2(size),
    volume=lambda size, _: Fraction(int(size > 1)),
    rounds_formula="ceil(log2 p)",
    volume_formula="1; p > 1",
    restrictions="commutative operation",
    source=("Chan, Heimlich, Purkayastha and van de Geijn, CCPE 19(13):1749-1783, 2007, doi:10.1002/cpe.1206"),
    takes_root=True,
)
