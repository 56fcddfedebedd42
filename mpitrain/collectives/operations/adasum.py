"""Adasum: an all-reduce that adds what is new in each rank's vector, and averages what vectors have in common.

Two vectors are combined to (1 - a.b / 2a.a) a + (1 - a.b / 2b.b) b: their sum if they are orthogonal, their average if
they are equal, and whatever lies between. More are combined in pairs, then pairs of pairs, and so on.

Source: Maleki, Musuvathi et al., Scaling Distributed Training with Adaptive Summation, MLSys 2021, arXiv:2006.02924;
its algorithm 1, recursive vector halving: partners exchange halves, so at distance 2^k each of 2^(k+1) ranks holds
one part of the two vectors to combine, and they sum up their shares of the inner products. The paper has powers of two
only. Of other numbers of ranks, the first are combined in pairs before, as in `mpitrain.schedules.fold`.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mpitrain.collectives.context import Context
from mpitrain.collectives.executor import Task
from mpitrain.collectives.layout import Layout
from mpitrain.collectives.plan import Call, Plan
from mpitrain.collectives.program import Program, compile_rounds
from mpitrain.memory import FlatArray, ReduceOp, add_weighted, dtype_named, inner_products
from mpitrain.schedules import Receive, Round, Send
from mpitrain.schedules.fold import Fold
from mpitrain.schedules.recursive import exchanges

__all__ = ["plan_adasum"]

_FLOAT64 = dtype_named("float64")

Span = tuple[int, int]


class _Level(NamedTuple):
    """One combination of two vectors, of which this rank computes a part.

    Attributes:
        peer: Whose vector is combined with this rank's.
        is_lower: Whether this rank's is the first of the two.
        kept: What is combined here, in elements.
        sent: What is combined there.
        exchange: Brings the peer's share of `kept`, and takes away `sent`.
        summation: Adds up the inner products over the ranks that hold parts of the same two vectors.
    """

    peer: int
    is_lower: bool
    kept: Span
    sent: Span
    exchange: Program
    summation: Program


def plan_adasum(context: Context, view: FlatArray, parts: Sequence[int] | None, description: str) -> Plan[Any]:
    """Prepare an Adasum of `view`, in place.

    Args:
        context: Of the communicator.
        view: Floating-point; shape and dtype the same on every rank.
        parts: Counts of the vectors that lie in it one after another, each of which is combined by itself; one if
            not given. Same on every rank.
        description: See `Plan`.

    Cost: with m = floor(log2 p), 2m rounds of at most 2n bytes in all, as a halving-doubling all-reduce, and
        m(m+1)/2 rounds of 24 bytes for each part; 2 rounds of n bytes more unless p is a power of two.
    Determinism: same bits on all ranks, run after run.

    Raises:
        ValueError: Parts that are not what the array holds.
    """
    counts = [view.count] if parts is None else [int(count) for count in parts]
    if sum(counts) != view.count or min(counts, default=0) < 0:
        raise ValueError(f"parts: must be counts that add up to {view.count}, got {counts}; pass one per vector")
    bounds = [0, *accumulate(counts)]
    fold = Fold.of(context.rank, context.size)
    levels = [] if fold.is_extra else _levels(context, fold, view, len(counts))
    gathering = _gathering(context, levels, view)
    is_folded = fold.is_paired
    arrival, departure = (_whole(context, fold, view, is_send=fold.is_extra == is_first) for is_first in (True, False))
    largest_count = view.count if is_folded else max((level.kept[1] - level.kept[0] for level in levels), default=0)

    def task(call: Call) -> Task[Any]:
        memory = context.scratch.acquire(largest_count * view.dtype.itemsize)
        received = memory.view(view.dtype.storage)
        arrays = [view.data, received]
        if is_folded:
            yield from context.execute(arrival, [view.data if fold.is_extra else received], view.dtype, call)
        if is_folded and not fold.is_extra:
            whole = (0, view.count)
            products = _products(view, received, bounds, whole)
            _combine(view, received, bounds, whole, products)
        for level in levels:
            yield from context.execute(level.exchange, arrays, view.dtype, call)
            products = _products(view, received, bounds, level.kept)
            # Rows are [a.b, a.a, b.b] on all ranks.
            shared = products if level.is_lower else products[:, [0, 2, 1]]
            total = np.ascontiguousarray(shared).reshape(-1)
            yield from context.execute(level.summation, [total], _FLOAT64, call, ReduceOp.SUM)
            products = total.reshape(products.shape)
            _combine(view, received, bounds, level.kept, products if level.is_lower else products[:, [0, 2, 1]])
        yield from context.execute(gathering, [view.data], view.dtype, call)
        if is_folded:
            yield from context.execute(departure, [view.data], view.dtype, call)
        context.scratch.release(memory)
        return view.owner

    return Plan(description if parts is None else f"{description} in parts {counts}", task)


def _levels(context: Context, fold: Fold, view: FlatArray, num_parts: int) -> list[_Level]:
    levels: list[_Level] = []
    begin, end = 0, view.count
    peers: list[int] = []
    for exchange in exchanges(fold):
        peer, is_lower = exchange.peer, exchange.own_start < exchange.sibling_start
        middle = (begin + end) // 2
        halves = (begin, middle), (middle, end)
        kept, sent = halves if is_lower else halves[::-1]
        peers.append(peer)
        swap = Round((Send(peer, 0, 1),), (Receive(peer, 1, 2),))
        layout = Layout((sent[1] - sent[0], kept[1] - kept[0]), (sent[0], 0), (0, 1))
        adding = [Round((Send(each, 0, 1),), (Receive(each, 0, 1, reduce=True),)) for each in peers]
        levels.append(
            _Level(
                peer,
                is_lower,
                kept,
                sent,
                compile_rounds([swap], layout, _segment_count(context, view)),
                compile_rounds(adding, Layout.packed((3 * num_parts,)), max(1, 3 * num_parts)),
            )
        )
        begin, end = kept
    return levels


def _gathering(context: Context, levels: Sequence[_Level], view: FlatArray) -> Program:
    """Return the program that brings the results of all ranks to all: the exchanges of the levels, undone."""
    spans = [span for level in levels for span in (level.kept, level.sent)]
    layout = Layout(tuple(end - begin for begin, end in spans), tuple(begin for begin, _ in spans), (0,) * len(spans))
    rounds = [
        Round((Send(level.peer, 2 * k, 2 * k + 1),), (Receive(level.peer, 2 * k + 1, 2 * k + 2),))
        for k, level in enumerate(levels)
    ]
    return compile_rounds(rounds[::-1], layout, _segment_count(context, view))


def _whole(context: Context, fold: Fold, view: FlatArray, *, is_send: bool) -> Program:
    """Return the program that sends a whole array to the other rank of a pair, or receives that one's."""
    partner = context.rank ^ 1
    a_round = Round((Send(partner, 0, 1),), ()) if is_send else Round((), (Receive(partner, 0, 1),))
    return compile_rounds(
        [a_round] if fold.is_paired else [], Layout.packed((view.count,)), _segment_count(context, view)
    )


def _segment_count(context: Context, view: FlatArray) -> int:
    return max(1, context.settings.segment_nbytes // view.dtype.itemsize)


def _products(view: FlatArray, other: NDArray[Any], bounds: Sequence[int], span: Span) -> NDArray[np.float64]:
    """Return, for each part, what lies in `span` of the inner products own x other, own x own and other x other."""
    products = np.zeros((len(bounds) - 1, 3))
    for part, begin, end in _cut(bounds, span):
        own = view.data[begin:end]
        products[part] = inner_products(own, other[begin - span[0] : end - span[0]], view.dtype)
    return products


def _combine(
    view: FlatArray, other: NDArray[Any], bounds: Sequence[int], span: Span, products: NDArray[np.float64]
) -> None:
    """Combine what lies in `span` of both vectors, into this rank's."""
    for part, begin, end in _cut(bounds, span):
        both, own_squared, other_squared = products[part].tolist()
        own = view.data[begin:end]
        weights = _weight(both, own_squared), _weight(both, other_squared)
        add_weighted(own, weights[0], other[begin - span[0] : end - span[0]], weights[1], view.dtype)


def _weight(both: float, squared: float) -> float:
    # A vector of zeros adds nothing, whatever its weight, and takes nothing away from the other.
    return 1.0 - both / (2.0 * squared) if squared else 1.0


def _cut(bounds: Sequence[int], span: Span) -> list[tuple[int, int, int]]:
    """Return (part, begin, end) of what each part has in a span of the array, if anything."""
    first = max(0, bisect.bisect_right(bounds, span[0]) - 1)
    last = bisect.bisect_left(bounds, span[1])
    pieces = [(part, max(bounds[part], span[0]), min(bounds[part + 1], span[1])) for part in range(first, last)]
    return [piece for piece in pieces if piece[1] < piece[2]]
