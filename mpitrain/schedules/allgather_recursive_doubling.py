"""Recursive doubling allgather: peers exchange all they hold over doubling distances.

Terms: core and extra ranks are those of `mpitrain.schedules.fold`; the gathered buffer
consists of `size` chunks, one from each rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

from mpitrain.schedules.algorithm import Algorithm
from mpitrain.schedules.fold import Fold, floor_log2, is_power_of_two
from mpitrain.schedules.recursive import doubling_rounds
from mpitrain.schedules.rounds import Round

__all__ = ["ALGORITHM", "allgather_recursive_doubling"]


def allgather_recursive_doubling(rank: int, size: int) -> Iterator[Round]:
    """Yield the rounds of `rank`, which starts with chunk `rank` only.

    Requires: nothing. Any `size`, but it is at its best on powers of two.
    Cost: with m = floor(log2 p), m rounds and (p-1)/p * n bytes sent by each rank if p is a
        power of two. Else m+2 rounds; with e = p - 2^m, rank 0 sends the most:
        (2^m - 1 + sum over k < m of min(2^k, e)) / p * n bytes in the core and n to its extra.
    Source: Thakur, Rabenseifner and Gropp, IJHPCA 19(1):49-66, 2005,
        doi:10.1177/1094342005051521. We fold sizes that are no power of two.
    """
    fold = Fold.of(rank, size)
    yield from fold.fold_in(fold.extra, fold.extra + 1, reduce=False)
    # The first rank of a group is also the first chunk of it.
    yield from doubling_rounds(fold, fold.rank_of)
    yield from fold.fold_out(0, size)


def _rounds(size: int, _: int) -> int:
    is_folded = not is_power_of_two(size)
    return floor_log2(size) + 2 * is_folded


def _volume(size: int, _: int) -> Fraction:
    m = floor_log2(size)
    e = size - (1 << m)
    # The pairs come first, so the block of rank 0 is the longest one in every round:
    # 2^k groups, of which the first e have two chunks.
    sent_in_core = sum((1 << k) + min(1 << k, e) for k in range(m))
    return Fraction(sent_in_core, size) + (e > 0)


ALGORITHM = Algorithm(
    collective="allgather",
    name="recursive_doubling",
    schedule=allgather_recursive_doubling,
    num_chunks=lambda size, _: size,
    rounds=_rounds,
    volume=_volume,
    rounds_formula="m, or m+2 if p > 2^m; m = floor(log2 p)",
    volume_formula=("(p-1)/p, or 1 + (2^m - 1 + sum of min(2^k, p - 2^m) over k < m)/p if p > 2^m; m = floor(log2 p)"),
    restrictions="none",
    source=("Thakur, Rabenseifner and Gropp, IJHPCA 19(1):49-66, 2005, doi:10.1177/1094342005051521"),
)
