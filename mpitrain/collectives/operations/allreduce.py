"""All-reduce: every rank gets the reduction of all ranks' arrays."""

from __future__ import annotations

from typing import Any

from mpitrain.collectives.context import Context
from mpitrain.collectives.executor import Task
from mpitrain.collectives.layout import Layout, even_counts
from mpitrain.collectives.plan import Call, Plan
from mpitrain.collectives.selection import NATIVE, choose_algorithm
from mpitrain.memory import ReduceOp, check_op, copy_of, divide_by, flat_view, parse_op

__all__ = ["plan_allreduce"]


def plan_allreduce(
    context: Context, array: Any, *, op: str | ReduceOp = "sum", algorithm: str = "auto", in_place: bool = False
) -> Plan[Any]:
    """Prepare an all-reduce of `array`.

    Args:
        context: Of the communicator.
        array: Any shape; shape and dtype the same on every rank. Modified only if `in_place`.
        op: Same on every rank.
        algorithm: Same on every rank; "auto" takes the setting, which is "auto" unless somebody set it.
        in_place: Each run reduces what `array` holds then, and replaces it. Else the array is copied now,
            and the plan is good for one run.

    Raises:
        ValueError, TypeError: Bad argument.
    """
    op = parse_op(op)
    view = flat_view(copy_of(array) if not in_place else array, writable=True)
    dtype = view.dtype
    check_op(op, dtype)
    if algorithm == "auto":
        algorithm = context.settings.algorithm
    name = choose_algorithm("allreduce", algorithm, view.nbytes, has_native=context.has_native)
    uses_native = name == NATIVE
    if not uses_native:
        counts = even_counts(view.count, context.num_chunks("allreduce", name, view.nbytes))
        program = context.program("allreduce", name, Layout.packed(counts), dtype, nbytes=view.nbytes)

    def task(call: Call) -> Task[Any]:
        if uses_native:
            yield from context.run_native(call, context.transport.native.allreduce, view.data, dtype, op)
        else:
            yield from context.execute(program, [view.data], dtype, call, op)
        if op is ReduceOp.AVERAGE:
            divide_by(view.data, context.size, dtype)
        return view.owner

    description = f"allreduce {op.name.lower()} of {dtype} {list(view.shape)} by {name}"
    return Plan(description, task, uses_native)
