"""All-reduce: every rank gets the reduction of all ranks' arrays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mpitrain.collectives.context import Context
from mpitrain.collectives.executor import Task
from mpitrain.collectives.layout import Layout, even_counts
from mpitrain.collectives.operations.adasum import plan_adasum
from mpitrain.collectives.plan import Call, Plan
from mpitrain.collectives.quick import Caller, Quick
from mpitrain.collectives.quick_native import QuickNative
from mpitrain.collectives.quick_ordinary import QuickOrdinary
from mpitrain.collectives.quick_small import QuickSmall
from mpitrain.collectives.reduction import Reduction
from mpitrain.collectives.selection import NATIVE
from mpitrain.collectives.small import SmallAllreduce
from mpitrain.memory import FlatArray, ReduceOp, SharedArray, check_op, copy_of, flat_view, parse_op

__all__ = ["plan_allreduce"]


def plan_allreduce(
    context: Context,
    array: Any,
    *,
    op: str | ReduceOp = "sum",
    algorithm: str = "auto",
    blocking: bool = True,
    in_place: bool = False,
    parts: Sequence[int] | None = None,
) -> Plan[Any]:
    """Prepare an all-reduce of `array`.

    Args:
        context: Of the communicator.
        array: Any shape; shape and dtype the same on every rank. Modified only if `in_place`.
        op: Same on every rank.
        algorithm: Same on every rank; "auto" takes the setting, which is "auto" unless somebody set it.
        blocking: Whether the plan is made to be waited for at once; same on every rank.
        in_place: Each run reduces what `array` holds then, and replaces it. Else the array is copied now,
            and the plan is good for one run.
        parts: For adasum, counts of the vectors that the array holds; same on every rank. See `plan_adasum`.

    Raises:
        ValueError, TypeError: Bad argument.
    """
    view = flat_view(copy_of(array) if not in_place else array, writable=True)
    dtype = view.dtype
    if parse_op(op) is ReduceOp.ADASUM:
        check_op(ReduceOp.ADASUM, dtype)
        if algorithm != "auto":
            raise ValueError(f"algorithm: adasum has one of its own, got {algorithm!r}; leave it out")
        return plan_adasum(context, view, parts, f"allreduce adasum of {dtype} {list(view.shape)}")
    if parts is not None:
        raise ValueError(f"parts: are for adasum, got {list(parts)} for {parse_op(op).name.lower()}; leave them out")
    op = context.check_reduction("allreduce", op, dtype)
    if algorithm == "auto":
        algorithm = context.settings.algorithm
    place = context.place_of(array) if in_place else ""
    name = context.choose("allreduce", algorithm, view.nbytes, blocking=blocking, in_window=bool(place))
    description = f"allreduce {op.name.lower()} of {dtype} {list(view.shape)}{place} by {name}"
    if name == context.available.shared:
        if blocking and context.meeting is not None and view.nbytes <= context.meeting.slot_nbytes:
            small = SmallAllreduce(context.meeting, Reduction(dtype, op, context.size), view.count)
            # What is in shared memory already is not copied there, if it takes two exchanges anyway.
            if small.is_whole or not place:
                return _plan_at_meeting(context, small, view, description)
        return _plan_in_node(context, array if place else None, view, op, description, blocking=blocking)
    uses_native = name == NATIVE
    if not uses_native:
        counts = even_counts(view.count, context.num_chunks("allreduce", name, view.nbytes))
        program = context.program("allreduce", name, Layout.packed(counts), dtype, nbytes=view.nbytes)

    finish = context.finisher(dtype, op)

    def task(call: Call) -> Task[Any]:
        if uses_native:
            yield from context.run_native(call, context.transport.native.allreduce, view.data, dtype, op)
            finish(view.data)
        else:
            yield from context.execute(program, [view.data], dtype, call, op, finish=finish)
        return view.owner

    nbytes = view.nbytes

    def quick(caller: Caller, _shape: tuple[int, ...]) -> Quick:
        return QuickNative(context, caller, Reduction(dtype, op, context.size), nbytes, description)

    return Plan(
        description,
        task,
        uses_native,
        nbytes=view.nbytes,
        is_gated=not uses_native,
        quick=quick if uses_native and blocking and _meets(context) else None,
    )


def _plan_at_meeting(context: Context, small: SmallAllreduce, view: FlatArray, description: str) -> Plan[Any]:
    """Prepare an all-reduce of a small array that is brought to the meeting of the node's ranks."""

    def task(_call: Call) -> Task[Any]:
        yield from small.take(view.data, view.data)
        return view.owner

    def quick(caller: Caller, shape: tuple[int, ...]) -> Quick:
        return QuickSmall(context, caller, small, shape, description)

    return Plan(description, task, nbytes=view.nbytes, bring=lambda: small.bring(view.data), quick=quick)


def _plan_in_node(
    context: Context, shared: SharedArray | None, view: FlatArray, op: ReduceOp, description: str, *, blocking: bool
) -> Plan[Any]:
    """Prepare an all-reduce by load and store: of an array in shared memory, or of ordinary ones."""
    reduction = Reduction(view.dtype, op, context.size)
    description = f"{description} in shared memory" if shared is not None else description

    def task(call: Call) -> Task[Any]:
        if shared is not None:
            yield from context.run_shared(shared, reduction, call)
        else:
            yield from context.run_ordinary(view.data, view.data, reduction, call)
        return view.owner

    nbytes = view.nbytes

    def quick(caller: Caller, _shape: tuple[int, ...]) -> Quick:
        return QuickOrdinary(context, caller, reduction, nbytes, description)

    is_quick = shared is None and blocking and _meets(context)
    return Plan(
        description,
        task,
        uses_staging=shared is None,
        uses_flags=True,
        nbytes=nbytes,
        is_gated=shared is None,
        quick=quick if is_quick else None,
    )


def _meets(context: Context) -> bool:
    """Whether the ranks meet without being asked to, and nobody wants to stop waiting."""
    return context.meeting is not None and context.settings.check and not context.settings.timeout_s
