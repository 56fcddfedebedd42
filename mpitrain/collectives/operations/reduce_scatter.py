"""Reduce-scatter: every rank gets its part of the reduction of all ranks' arrays."""

from __future__ import annotations

import math
from typing import Any

from mpitrain.collectives.context import Context
from mpitrain.collectives.exchange import ReduceScatter, plan_exchange
from mpitrain.collectives.executor import Task
from mpitrain.collectives.layout import Layout, even_counts
from mpitrain.collectives.plan import Call, Plan
from mpitrain.collectives.reduction import Reduction
from mpitrain.collectives.selection import DIRECT, NATIVE
from mpitrain.memory import ReduceOp, allocate_like, flat_view

__all__ = ["plan_reduce_scatter"]


def plan_reduce_scatter(
    context: Context, array: Any, *, op: str | ReduceOp = "sum", algorithm: str = "auto", blocking: bool = True
) -> Plan[Any]:
    """Prepare a reduce-scatter of `array`, of which rank r gets the r-th part along the first dimension.

    Where the first dimension does not divide, the first ranks get one row more.

    Raises:
        ValueError, TypeError: Bad argument, such as an array without dimensions.
    """
    view = flat_view(array)
    dtype = view.dtype
    op = context.check_reduction("reduce_scatter", op, dtype)
    if not view.shape:
        raise ValueError("reduce_scatter: needs at least one dimension to cut along, got shape (); reshape the array")
    rows = even_counts(view.shape[0], context.size)
    row_count = math.prod(view.shape[1:])
    counts = tuple(row * row_count for row in rows)
    layout = Layout.packed(counts)
    place = context.place_of(array)
    name = context.choose("reduce_scatter", algorithm, view.nbytes, blocking=blocking, in_window=bool(place))
    description = f"reduce_scatter {op.name.lower()} of {dtype} {list(view.shape)}{place} by {name}"
    if name == DIRECT:
        scattered = allocate_like(array, (rows[context.rank], *view.shape[1:]))
        reduction = Reduction(dtype, op, context.size)
        exchange = ReduceScatter(context.rank, view.data, flat_view(scattered, writable=True).data, layout, reduction)
        return plan_exchange(
            context,
            exchange,
            array,
            storage=dtype.storage,
            description=description,
            result=lambda: scattered,
            blocking=blocking,
        )
    uses_native = name == NATIVE
    finish = context.finisher(dtype, op)
    if not uses_native:
        program = context.program("reduce_scatter", name, layout, dtype, nbytes=view.nbytes)

    def task(call: Call) -> Task[Any]:
        result = context.new_like(array, (rows[context.rank], *view.shape[1:]), call)
        part = flat_view(result, writable=True).data
        if uses_native:
            native = context.transport.native.reduce_scatter
            yield from context.run_native(call, native, view.data, part, counts, dtype, op)
        else:
            # Partial results replace the chunks that are passed on, so the caller's array is copied.
            memory = None if view.is_expendable else context.scratch.acquire(view.nbytes)
            work = view.data if memory is None else memory.view(dtype.storage)
            if memory is not None:
                context.copy(work, view.data)
            yield from context.execute(program, [work], dtype, call, op)
            offset = layout.offsets[context.rank]
            context.copy(part, work[offset : offset + part.size])
            if memory is not None:
                context.scratch.release(memory)
        finish(part)
        return result

    is_gated = not uses_native and view.is_expendable
    return Plan(description, task, uses_native, nbytes=view.nbytes, is_gated=is_gated)
