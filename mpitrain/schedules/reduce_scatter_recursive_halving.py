"""Recursive halving reduce-scatter: peers swap halves of what they still hold.

Terms: core and extra ranks are those of `mpitrain.schedules.fold`; the buffer is cut into
`size` chunks, one per rank, and a core rank works for the chunks of its group.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

from mpitrain.schedules.algorithm import Algorithm
from mpitrain.schedules.fold import Fold, floor_log2, is_power_of_two
from mpitrain.schedules.recursive import halving_rounds
from mpitrain.schedules.rounds import Round

__all__ = ["ALGORITHM", "reduce_scatter_recursive_halving"]


def reduce_scatter_recursive_halving(rank: int, size: int) -> Iterator[Round]:
    """Yield the rounds of `rank`, which ends with chunk `rank` fully reduced.

    Requires: a commutative operation. Any `size`.
    Cost: with m = floor(log2 p), m rounds, and 2 more unless p is a power of two; a rank
        sends at most (p-1)/p * n bytes, or n unless p is a power of two (an extra, which
        hands over its whole buffer).
    Source: Thakur, Rabenseifner and Gropp, IJHPCA 19(1):49-66, 2005,
        doi:10.1177/1094342005051521.
    """
    fold = Fold.of(rank, size)
    yield from fold.fold_in(0, size, reduce=True)
    # The first rank of a group is also the first chunk of it.
    yield from halving_rounds(fold, fold.rank_of)
    yield from fold.fold_out(fold.extra, fold.extra + 1)


def _rounds(size: int, _: int) -> int:
    is_folded = not is_power_of_two(size)
    return floor_log2(size) + 2 * is_folded


def _volume(size: int, _: int) -> Fraction:
    is_folded = not is_power_of_two(size)
    return Fraction(1) if is_folded else Fraction(size - 1, size)


ALGORITHM = Algorithm(
    collective="reduce_scatter",
    name="recursive_halving",
    schedule=reduce_scatter_recursive_halving,
    num_chunks=lambda size, _: size,
    rounds=_rounds,
    volume=_volume,
    rounds_formula="m, or m+2 if p > 2^m; m = floor(log2 p)",
    volume_formula="(p-1)/p, or 1 if p > 2^m; m = floor(log2 p)",
    restrictions="commutative operation",
    source=("Thakur, Rabenseifner and Gropp, IJHPCA 19(1):49-66, 2005, doi:10.1177/1094342005051521"),
)
