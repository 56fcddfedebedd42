"""Reduce: the root gets the reduction of all ranks' arrays."""

from __future__ import annotations

from typing import Any

from mpitrain.collectives.context import Context
from mpitrain.collectives.executor import Task
from mpitrain.collectives.layout import Layout, even_counts
from mpitrain.collectives.plan import Call, Plan
from mpitrain.collectives.selection import NATIVE
from mpitrain.memory import ReduceOp, copy_of, divide_by, flat_view

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
    # Partial results pass through every rank that receives, so all work on a copy.
    view = flat_view(copy_of(array), writable=True)
    dtype = view.dtype
    op = context.check_reduction("reduce", op, dtype)
    name = context.choose("reduce", algorithm, view.nbytes, blocking=blocking)
    uses_native = name == NATIVE
    if not uses_native:
        counts = even_counts(view.count, context.num_chunks("reduce", name, view.nbytes))
        program = context.program("reduce", name, Layout.packed(counts), dtype, nbytes=view.nbytes, root=root)

    def task(call: Call) -> Task[Any]:
        if uses_native:
            yield from context.run_native(call, context.transport.native.reduce, view.data, dtype, op, root)
        else:
            yield from context.execute(program, [view.data], dtype, call, op)
        if context.rank != root:
            return None
        if op is ReduceOp.AVERAGE:
            divide_by(view.data, context.size, dtype)
        return view.owner

    description = f"reduce {op.name.lower()} of {dtype} {list(view.shape)} to root {root} by {name}"
    return Plan(description, task, uses_native, nbytes=view.nbytes)
