"""Scatter-allgather broadcast: every rank gets a part from the root, then all share.

Terms: the buffer is cut into `size` chunks; `vrank` is the rank counted from the root, and
chunk v is the part of vrank v.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from itertools import chain

from mpitrain.schedules.algorithm import Algorithm
from mpitrain.schedules.binomial import binomial_down_rounds, ceil_log2, subtree_chunks
from mpitrain.schedules.bruck import bruck_rounds
from mpitrain.schedules.rotation import rotate_peers, to_vrank
from mpitrain.schedules.rounds import Round

__all__ = ["ALGORITHM", "broadcast_scatter_allgather"]


def broadcast_scatter_allgather(rank: int, size: int, root: int) -> Iterator[Round]:
    """Yield the rounds of `rank`: a binomial scatter, then an allgather.

    Requires: nothing. Any `size` and `root`.
    Cost: 2 ceil(log2 p) rounds; the root sends 2(p-1)/p * n bytes, the others less.
    Source: Barnett, Shuler, van de Geijn, Gupta, Payne and Watts, SHPCC 1994, 357-364,
        doi:10.1109/SHPCC.1994.296665. Our allgather is Bruck's and not the ring: as many bytes in
        fewer rounds.
    """
    vrank = to_vrank(rank, root, size)
    scatter = binomial_down_rounds(vrank, size, subtree_chunks)
    allgather = bruck_rounds(vrank, size)
    return rotate_peers(chain(scatter, allgather), root, size)


ALGORITHM = Algorithm(
    collective="broadcast",
    name="scatter_allgather",
    schedule=broadcast_scatter_allgather,
    num_chunks=lambda size, _: size,
    rounds=lambda size, _: 2 * ceil_log2(size),
    volume=lambda size, _: Fraction(2 * (size - 1), size),
    rounds_formula="2 ceil(log2 p)",
    volume_formula="2(p-1)/p",
    restrictions="none",
    source=(
        "Barnett, Shuler, van de Geijn, Gupta, Payne and Watts, SHPCC 1994, 357-364, doi:10.1109/SHPCC.1994.296665"
    ),
    takes_root=True,
)
