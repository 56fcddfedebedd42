"""All-to-all: every rank sends one part of its array to each rank."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from mpitrain.collectives.context import Context
from mpitrain.collectives.executor import Task
from mpitrain.collectives.layout import Layout
from mpitrain.collectives.plan import Call, Plan
from mpitrain.collectives.selection import NATIVE
from mpitrain.memory import FlatArray, flat_view

__all__ = ["plan_alltoall"]


def plan_alltoall(
    context: Context,
    array: Any,
    *,
    splits: Sequence[int] | None = None,
    received_splits: Sequence[int] | None = None,
    algorithm: str = "auto",
    blocking: bool = True,
) -> Plan[tuple[Any, list[int]]]:
    """Prepare an all-to-all along the first dimension; the result is the new array and what came from whom.

    Args:
        context: Of the communicator.
        array: Shape `(rows, ...)`; dtype and further dimensions the same on every rank.
        splits: How many rows go to each rank; None cuts evenly. Given on every rank or on none.
        received_splits: How many rows come from each rank, if the caller knows; else the ranks ask each other first.
        algorithm: Same on every rank.
        blocking: Whether the plan is made to be waited for at once; same on every rank.

    Raises:
        ValueError, TypeError: Bad argument.
    """
    view = flat_view(array)
    size = context.size
    sent_splits = _checked_splits(view, splits, size)
    if splits is None:
        received_splits = sent_splits
    # Only ranks that cut evenly know a size that all share.
    nbytes = view.nbytes if splits is None else 0
    name = context.choose("alltoall", algorithm, nbytes, blocking=blocking)
    uses_native = name == NATIVE

    def task(call: Call) -> Task[tuple[Any, list[int]]]:
        if received_splits is not None:
            known_splits = list(received_splits)
        else:
            known_splits = yield from _ask_splits(context, sent_splits, call)
        result = yield from _exchange(context, view, (sent_splits, known_splits), name, call)
        return result, known_splits

    cut = f"{list(view.shape)} evenly" if splits is None else f"rows of {list(view.shape[1:])}"
    return Plan(f"alltoall of {view.dtype} {cut} by {name}", task, uses_native, nbytes=view.nbytes)


def _checked_splits(view: FlatArray, splits: Sequence[int] | None, size: int) -> list[int]:
    if not view.shape:
        raise ValueError("alltoall: needs at least one dimension to cut along, got shape (); reshape the array")
    if splits is None:
        if view.shape[0] % size:
            raise ValueError(
                f"alltoall: first dimension must be a multiple of the number of ranks, got {view.shape[0]} for "
                f"{size} ranks; pass splits"
            )
        return [view.shape[0] // size] * size
    splits = [int(rows) for rows in splits]
    if len(splits) != size or min(splits) < 0 or sum(splits) > view.shape[0]:
        raise ValueError(
            f"alltoall: splits must be {size} numbers of rows, at most {view.shape[0]} in all, got {splits}; "
            "pass one number per rank"
        )
    return splits


def _ask_splits(context: Context, splits: list[int], call: Call) -> Task[list[int]]:
    plan = plan_alltoall(context, np.array(splits, np.int64), algorithm="pairwise")
    answer, _ = yield from plan.task(call._replace(gates=None))
    return [int(rows) for rows in answer]


def _exchange(
    context: Context, view: FlatArray, splits: tuple[list[int], list[int]], name: str, call: Call
) -> Task[Any]:
    sent_splits, received_splits = splits
    rank, dtype = context.rank, view.dtype
    rest = view.shape[1:]
    row_count = math.prod(rest)
    send_counts = tuple(rows * row_count for rows in sent_splits)
    receive_counts = tuple(rows * row_count for rows in received_splits)
    result = context.new_like(view, (sum(received_splits), *rest), call)
    data = flat_view(result, writable=True).data
    if name == NATIVE:
        native = context.transport.native.alltoall
        yield from context.run_native(call, native, view.data, data, send_counts, receive_counts, dtype)
        return result
    layout = Layout.packed(send_counts, receive_counts)
    begin, target = layout.offsets[rank], layout.offsets[context.size + rank]
    context.copy(data[target : target + receive_counts[rank]], view.data[begin : begin + send_counts[rank]])
    program = context.program("alltoall", name, layout, dtype, nbytes=view.nbytes)
    yield from context.execute(program, [view.data, data], dtype, call)
    return result
