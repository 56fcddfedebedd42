"""Scatter: every rank gets its part of the root's array."""

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

__all__ = ["plan_scatter"]


def plan_scatter(
    context: Context, array: Any, out: Any, *, root: int = 0, algorithm: str = "auto", blocking: bool = True
) -> Plan[Any]:
    """Prepare a scatter of the root's `array` into the `out` of every rank.

    Args:
        context: Of the communicator.
        array: On the root, `size` times the elements of `out`, same dtype; ignored (None) elsewhere.
        out: Gets the r-th part on rank r, the root included; shape and dtype the same on every rank.
        root: Same on every rank.
        algorithm: Same on every rank.
        blocking: Whether the plan is made to be waited for at once; same on every rank.

    Raises:
        ValueError, TypeError: Bad argument; that `array` does not fit is seen by the root only.
    """
    context.check_root("scatter", root)
    part = flat_view(out, name="out", writable=True)
    dtype = part.dtype
    rank, size = context.rank, context.size
    whole = flat_view(array) if rank == root else None
    if whole is not None and (whole.dtype is not dtype or whole.count != size * part.count):
        raise ValueError(
            f"scatter: the root's array must hold {size} times {part.count} elements of {dtype}, "
            f"got {whole.count} of {whole.dtype}; pass one part per rank"
        )
    counts = (part.count,) * size
    nbytes = part.nbytes * size
    name = context.choose("scatter", algorithm, nbytes, blocking=blocking)
    uses_native = name == NATIVE
    if not uses_native:
        touched = range(size) if rank == root else touched_chunks(find_algorithm("scatter", name), rank, size, root)
        layout = Layout.compact(counts, tuple(touched))
        program = context.program("scatter", name, layout, dtype, nbytes=nbytes, root=root)

    def task(call: Call) -> Task[Any]:
        data = None if whole is None else whole.data
        if uses_native:
            native = context.transport.native.scatter
            yield from context.run_native(call, native, data, part.data, counts, dtype, root)
            return out
        memory = None
        if data is None:
            memory = context.scratch.acquire(len(touched) * part.nbytes)
            data = memory.view(dtype.storage)
        yield from context.execute(program, [data], dtype, call)
        offset = layout.offsets[rank]
        context.copy(part.data, data[offset : offset + part.count])
        if memory is not None:
            context.scratch.release(memory)
        return out

    return Plan(
        f"scatter of {dtype} {list(part.shape)} from root {root} by {name}",
        task,
        uses_native,
        nbytes=part.nbytes,
        is_gated=not uses_native,
    )
