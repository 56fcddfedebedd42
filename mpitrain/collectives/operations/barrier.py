"""Barrier: no rank leaves before all have come."""

from __future__ import annotations

from mpitrain.collectives.context import Context
from mpitrain.collectives.executor import Task
from mpitrain.collectives.layout import Layout
from mpitrain.collectives.plan import Call, Plan
from mpitrain.collectives.selection import NATIVE
from mpitrain.memory import dtype_named

__all__ = ["plan_barrier"]


def plan_barrier(context: Context, *, algorithm: str = "auto", blocking: bool = True) -> Plan[None]:
    """Prepare a barrier.

    Raises:
        ValueError: Unknown algorithm.
    """
    name = context.choose("barrier", algorithm, 0, blocking=blocking)
    uses_native = name == NATIVE
    no_type = dtype_named("uint8")
    if not uses_native:
        program = context.program("barrier", name, Layout.packed(()), no_type, nbytes=0)

    def task(call: Call) -> Task[None]:
        if uses_native:
            yield from context.run_native(call, context.transport.native.barrier)
        else:
            yield from context.execute(program, [], no_type, call)

    return Plan(f"barrier by {name}", task, uses_native)
