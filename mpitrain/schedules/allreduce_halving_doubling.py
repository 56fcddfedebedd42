"""Halving-doubling all-reduce: reduce-scatter by halving, then allgather by doubling.

Terms: core and extra ranks are those of `mpitrain.schedules.fold`; the buffer is cut into
one chunk per core rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

from mpitrain.schedules.algorithm import Algorithm
from mpitrain.schedules.fold import Fold, floor_log2, is_power_of_two
from mpitrain.schedules.recursive import doubling_rounds, halving_rounds
from mpitrain.schedules.rounds import Round

__all__ = ["ALGORITHM", "allreduce_halving_doubling"]


def allreduce_halving_doubling(rank: int, size: int) -> Iterator[Round]:
    """Yield the rounds of `rank`: few of them, with as few bytes as a ring's in the core.

    Requires: a commutative operation. Any `size`.
    Cost: with m = floor(log2 p), 2m rounds, and 2 more unless p is a power of two; a rank sends
        at most 2(2^m - 1)/2^m * n bytes, and n more unless p is a power of two.
    Determinism: same bits on all ranks, as each chunk is reduced once and then copied.
    Source: Rabenseifner, ICCS 2004, LNCS 3036:1-9, doi:10.1007/978-3-540-24685-5_1. We hand
        all data of an extra rank over at once, where the paper splits it.
    """
    fold = Fold.of(rank, size)
    yield from fold.fold_in(0, fold.core_size, reduce=True)
    yield from halving_rounds(fold, _chunk_of_core)
    yield from doubling_rounds(fold, _chunk_of_core)
    yield from fold.fold_out(0, fold.core_size)


def _chunk_of_core(core: int) -> int:
    return core


def _rounds(size: int, _: int) -> int:
    is_folded = not is_power_of_two(size)
    return 2 * floor_log2(size) + 2 * is_folded


def _volume(size: int, _: int) -> Fraction:
    core_size = 1 << floor_log2(size)
    is_folded = not is_power_of_two(size)
    return Fraction(2 * (core_size - 1), core_size) + is_folded


ALGORITHM = Algorithm(
    collective="allreduce",
    name="halving_doubling",
    schedule=allreduce_halving_doubling,
    num_chunks=lambda size, _: 1 << floor_log2(size),
    rounds=_rounds,
    volume=_volume,
    rounds_formula="2m, or 2m+2 if p > 2^m; m = floor(log2 p)",
    volume_formula="2(2^m-1)/2^m, and 1 more if p > 2^m; m = floor(log2 p)",
    restrictions="commutative operation",
    source="Rabenseifner, ICCS 2004, LNCS 3036:1-9, doi:10.1007/978-3-540-24685-5_1",
)
