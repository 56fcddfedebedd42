"""Reduce: the root gets the reduction of all ranks' arrays."""

from __future__ import annotations

from typing import Any

from mpitrain.collectives.context import Context
from mpitrain.collectives.exchange import Reduce, plan_exchange
from mpitrain.collectives.executor import Task
from mpitrain.collectives.layout import Layout, even_counts
from mpitrain.collectives.plan import Call, Plan
from mpitrain.collectives.reduction import Reduction
from mpitrain.collectives.selection import DIRECT, NATIVE
from mpitrain.memory import ReduceOp, allocate_like, flat_view

__all__ = ["plan_reduce"]


def plan_reduce(
    context: Context,
    array: Any,
    *,
    root: int = 0,
    op: str | ReduceOp = "sum",
    algorithm: str = "auto",
    blocking: bool = True,
) -> Plan[Any]:
    """Prepare a reduction of `array`, of any shape, to `root`; the result is None on the other ranks.

    Raises:
        ValueError, TypeError: Bad argument.
    """
    context.check_root("reduce", root)
    given = flat_view(array)
    dtype = given.dtype
    op = context.check_reduction("reduce", op, dtype)
    place = context.place_of(array)
    name = context.choose("reduce", algorithm, given.nbytes, blocking=blocking, in_window=bool(place))
    description = f"reduce {op.name.lower()} of {dtype} {list(given.shape)}{place} to root {root} by {name}"
    if name == DIRECT:
        reduced = allocate_like(array, given.shape) if context.rank == root else None
        total = None if reduced is None else flat_view(reduced, writable=True).data
        exchange = Reduce(context.rank, given.data, total, Reduction(dtype, op, context.size))
        return plan_exchange(
            context,
            exchange,
            array,
            storage=dtype.storage,
            description=description,
            result=lambda: reduced,
            blocking=blocking,
        )
    # Partial results pass through every rank that receives, so all work on a copy.
    view = given if given.is_expendable else flat_view(allocate_like(array, given.shape), writable=True)
    finish, is_root = context.finisher(dtype, op), context.rank == root
    uses_native = name == NATIVE
    if not uses_native:
        counts = even_counts(view.count, context.num_chunks("reduce", name, view.nbytes))
        program = context.program("reduce", name, Layout.packed(counts), dtype, nbytes=view.nbytes, root=root)

    def task(call: Call) -> Task[Any]:
        if view is not given:
            context.copy(view.data, given.data)
        if uses_native:
            yield from context.run_native(call, context.transport.native.reduce, view.data, dtype, op, root)
            if is_root:
                finish(view.data)
        else:
            yield from context.execute(program, [view.data], dtype, call, op, finish=finish if is_root else None)
        return view.owner if is_root else None

    is_gated = not uses_native and view is given
    return Plan(description, task, uses_native, nbytes=view.nbytes, is_gated=is_gated)
