"""Broadcast: every rank gets the root's array."""

from __future__ import annotations

from typing import Any

from mpitrain.collectives.context import Context
from mpitrain.collectives.exchange import Broadcast, plan_exchange
from mpitrain.collectives.executor import Task
from mpitrain.collectives.layout import Layout, even_counts
from mpitrain.collectives.plan import Call, Plan
from mpitrain.collectives.selection import DIRECT, NATIVE
from mpitrain.memory import copy_of, flat_view

__all__ = ["plan_broadcast"]


def plan_broadcast(
    context: Context,
    array: Any,
    *,
    root: int = 0,
    algorithm: str = "auto",
    blocking: bool = True,
    in_place: bool = False,
) -> Plan[Any]:
    """Prepare a broadcast of the root's `array`.

    Args:
        context: Of the communicator.
        array: Any shape; shape and dtype the same on every rank. Modified only if `in_place`, and not on the root.
        root: Same on every rank.
        algorithm: Same on every rank.
        blocking: Whether the plan is made to be waited for at once; same on every rank.
        in_place: The result replaces the contents of `array`, else it is a new array.

    Raises:
        ValueError, TypeError: Bad argument.
    """
    context.check_root("broadcast", root)
    view = flat_view(array if in_place else copy_of(array), writable=context.rank != root)
    dtype = view.dtype
    place = context.place_of(array) if in_place else ""
    name = context.choose("broadcast", algorithm, view.nbytes, blocking=blocking, in_window=bool(place))
    description = f"broadcast of {dtype} {list(view.shape)}{place} from root {root} by {name}"
    if name == DIRECT:
        exchange = Broadcast(context.rank, root, view.data)
        return plan_exchange(
            context,
            exchange,
            view.owner,
            storage=dtype.storage,
            description=description,
            result=lambda: view.owner,
            blocking=blocking,
        )
    uses_native = name == NATIVE
    if not uses_native:
        counts = even_counts(view.count, context.num_chunks("broadcast", name, view.nbytes))
        program = context.program("broadcast", name, Layout.packed(counts), dtype, nbytes=view.nbytes, root=root)

    def task(call: Call) -> Task[Any]:
        if uses_native:
            yield from context.run_native(call, context.transport.native.broadcast, view.data, dtype, root)
        else:
            yield from context.execute(program, [view.data], dtype, call)
        return view.owner

    return Plan(description, task, uses_native, nbytes=view.nbytes, is_gated=not uses_native)
