"""Gather: the root gets the arrays of all ranks, one after another."""

from __future__ import annotations

from typing import Any

from mpitrain.collectives.context import Context
from mpitrain.collectives.executor import Task
from mpitrain.collectives.layout import Layout
from mpitrain.collectives.plan import Call, Plan
from mpitrain.collectives.program import touched_chunks
from mpitrain.collectives.selection import NATIVE
from mpitrain.memory import flat_view
from mpitrain.schedules import find_algorithm

__all__ = ["plan_gather"]


def plan_gather(
    context: Context, array: Any, *, root: int = 0, algorithm: str = "auto", blocking: bool = True
) -> Plan[Any]:
    """Prepare a gather: the arrays of all ranks, in rank order, along the first dimension of a new one.

    Args:
        context: Of the communicator.
        array: Shape `(rows, ...)`, or `()` for one row; shape and dtype the same on every rank.
        root: Who gets the result, of shape `(size * rows, ...)`; the others get None.
        algorithm: Same on every rank.
        blocking: Whether the plan is made to be waited for at once; same on every rank.

    Raises:
        ValueError, TypeError: Bad argument.
    """
    context.check_root("gather", root)
    view = flat_view(array)
    dtype = view.dtype
    rank, size = context.rank, context.size
    counts = (view.count,) * size
    nbytes = view.nbytes * size
    name = context.choose("gather", algorithm, nbytes, blocking=blocking)
    uses_native = name == NATIVE
    if not uses_native:
        # Ranks between root and leaves hold what passes through them, and nothing else.
        touched = range(size) if rank == root else touched_chunks(find_algorithm("gather", name), rank, size, root)
        layout = Layout.compact(counts, tuple(touched))
        program = context.program("gather", name, layout, dtype, nbytes=nbytes, root=root)

    def task(call: Call) -> Task[Any]:
        rows, *rest = view.shape or (1,)
        result = context.new_like(array, (size * rows, *rest), call) if rank == root else None
        data = flat_view(result, writable=True).data if rank == root else None
        if uses_native:
            native = context.transport.native.gather
            yield from context.run_native(call, native, view.data, data, counts, dtype, root)
            return result
        memory = None
        if data is None:
            memory = context.scratch.acquire(len(touched) * view.nbytes)
            data = memory.view(dtype.storage)
        offset = layout.offsets[rank]
        context.copy(data[offset : offset + view.count], view.data)
        yield from context.execute(program, [data], dtype, call)
        if memory is not None:
            context.scratch.release(memory)
        return result

    return Plan(f"gather of {dtype} {list(view.shape)} to root {root} by {name}", task, uses_native, nbytes=view.nbytes)
