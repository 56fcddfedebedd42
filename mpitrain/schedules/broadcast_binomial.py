"""Binomial broadcast: the number of ranks that hold the buffer doubles in every round.

Terms: the buffer is one chunk; `vrank` is the rank counted from the root.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

from mpitrain.schedules.algorithm import Algorithm
from mpitrain.schedules.binomial import binomial_down_rounds, ceil_log2, one_chunk
from mpitrain.schedules.rotation import rotate_peers, to_vrank
from mpitrain.schedules.rounds import Round

__all__ = ["ALGORITHM", "broadcast_binomial"]


def broadcast_binomial(rank: int, size: int, root: int) -> Iterator[Round]:
    """Yield the rounds of `rank`.

    Requires: nothing. Any `size` and `root`.
    Cost: ceil(log2 p) rounds, the least possible; the root sends ceil(log2 p) * n bytes.
    Source: Chan, Heimlich, Purkayastha and van de Geijn, CCPE 19(13):1749-1783, 2007,
        doi:10.1002/cpe.1206 (the minimum spanning tree algorithm).
    """
    vrank = to_vrank(rank, root, size)
    return rotate_peers(binomial_down_rounds(vrank, size, one_chunk), root, size)


ALGORITHM = Algorithm(
    collective="broadcast",
    name="binomial",
    schedule=broadcast_binomial,
    num_chunks=lambda _size, _: 1,
    rounds=lambda size, _: ceil_log2(size),
    volume=lambda size, _: Fraction(ceil_log2(size)),
    rounds_formula="ceil(log2 p)",
    volume_formula="ceil(log2 p)",
    restrictions="none",
    source=("Chan, Heimlich, Purkayastha and van de Geijn, CCPE 19(13):1749-1783, 2007, doi:10.1002/cpe.1206"),
    takes_root=True,
)
