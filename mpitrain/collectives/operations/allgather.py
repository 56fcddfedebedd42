"""All-gather: every rank gets the arrays of all ranks, one after another."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from mpitrain.collectives.context import Context
from mpitrain.collectives.exchange import Allgather, plan_exchange
from mpitrain.collectives.executor import Task
from mpitrain.collectives.layout import Layout
from mpitrain.collectives.plan import Call, Plan
from mpitrain.collectives.selection import DIRECT, NATIVE
from mpitrain.memory import allocate_like, flat_view

__all__ = ["plan_allgather"]


def plan_allgather(
    context: Context, array: Any, *, rows: Sequence[int] | None = None, algorithm: str = "auto", blocking: bool = True
) -> Plan[Any]:
    """Prepare an all-gather: the arrays of all ranks, in rank order, along the first dimension.

    Args:
        context: Of the communicator.
        array: Shape `(rows, ...)`, or `()` for one row; dtype and further dimensions the same on every rank.
        rows: First dimension of every rank's array where these differ; same on every rank.
        algorithm: Same on every rank.
        blocking: Whether the plan is made to be waited for at once; same on every rank.

    Raises:
        ValueError, TypeError: Bad argument.
    """
    view = flat_view(array)
    dtype = view.dtype
    own_rows, *rest = view.shape or (1,)
    all_rows = tuple(int(each) for each in rows) if rows is not None else (own_rows,) * context.size
    if len(all_rows) != context.size or all_rows[context.rank] != own_rows:
        raise ValueError(
            f"allgather: rows must be one first dimension per rank and {own_rows} for rank {context.rank}, "
            f"got {list(all_rows)}; pass the same list on every rank"
        )
    row_count = math.prod(rest)
    counts = tuple(row * row_count for row in all_rows)
    layout = Layout.packed(counts)
    nbytes = sum(counts) * dtype.itemsize
    place = context.place_of(array)
    name = context.choose("allgather", algorithm, nbytes, blocking=blocking, in_window=bool(place))
    shape = [list(all_rows) if rows is not None else own_rows, *rest]
    description = f"allgather of {dtype} {shape}{place} by {name}"
    if name == DIRECT:
        gathered = allocate_like(array, (sum(all_rows), *rest))
        exchange = Allgather(context.rank, view.data, flat_view(gathered, writable=True).data, layout)
        return plan_exchange(
            context,
            exchange,
            array,
            storage=dtype.storage,
            description=description,
            result=lambda: gathered,
            blocking=blocking,
        )
    uses_native = name == NATIVE
    if not uses_native:
        program = context.program("allgather", name, layout, dtype, nbytes=nbytes)

    def task(call: Call) -> Task[Any]:
        result = context.new_like(array, (sum(all_rows), *rest), call)
        data = flat_view(result, writable=True).data
        offset = layout.offsets[context.rank]
        context.copy(data[offset : offset + view.count], view.data)
        if uses_native:
            yield from context.run_native(call, context.transport.native.allgather, data, counts, dtype)
        else:
            yield from context.execute(program, [data], dtype, call)
        return result

    return Plan(description, task, uses_native, nbytes=view.nbytes)
