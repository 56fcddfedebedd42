"""Recursive doubling all-reduce: the whole buffer is exchanged over doubling distances.

Terms: the buffer is one chunk; core and extra ranks are those of `mpitrain.schedules.fold`.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from itertools import repeat

from mpitrain.schedules.algorithm import Algorithm
from mpitrain.schedules.fold import Fold, floor_log2, is_power_of_two
from mpitrain.schedules.recursive import exchanges
from mpitrain.schedules.rounds import Receive, Round, Send

__all__ = ["ALGORITHM", "allreduce_recursive_doubling"]


def allreduce_recursive_doubling(rank: int, size: int) -> Iterator[Round]:
    """Yield the rounds of `rank`: few of them, each with the whole buffer.

    Requires: a commutative operation. Any `size`.
    Cost: with m = floor(log2 p), m rounds, and 2 more unless p is a power of two; a rank
        sends at most m * n bytes, and n more unless p is a power of two.
    Determinism: same bits on all ranks: two peers compute op(a, b) and op(b, a).
    Source: Thakur, Rabenseifner and Gropp, IJHPCA 19(1):49-66, 2005,
        doi:10.1177/1094342005051521.
    """
    fold = Fold.of(rank, size)
    yield from fold.fold_in(0, 1, reduce=True)
    if fold.is_extra:
        yield from repeat(Round(), fold.num_doublings)
    else:
        for exchange in exchanges(fold):
            yield Round(
                sends=(Send(exchange.peer, 0, 1),),
                receives=(Receive(exchange.peer, 0, 1, reduce=True),),
            )
    yield from fold.fold_out(0, 1)


def _rounds(size: int, _: int) -> int:
    is_folded = not is_power_of_two(size)
    return floor_log2(size) + 2 * is_folded


def _volume(size: int, _: int) -> Fraction:
    is_folded = not is_power_of_two(size)
    return Fraction(floor_log2(size) + is_folded)


ALGORITHM = Algorithm(
    collective="allreduce",
    name="recursive_doubling",
    schedule=allreduce_recursive_doubling,
    num_chunks=lambda _size, _: 1,
    rounds=_rounds,
    volume=_volume,
    rounds_formula="m, or m+2 if p > 2^m; m = floor(log2 p)",
    volume_formula="m, or m+1 if p > 2^m; m = floor(log2 p)",
    restrictions="commutative operation",
    source=("Thakur, Rabenseifner and Gropp, IJHPCA 19(1):49-66, 2005, doi:10.1177/1094342005051521"),
)
