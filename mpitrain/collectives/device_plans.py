"""All-reduces in device memory that the node shares."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from mpitrain.collectives import operations
from mpitrain.collectives.context import Context
from mpitrain.collectives.device_direct import DeviceRun
from mpitrain.collectives.executor import Task
from mpitrain.collectives.plan import Call, Plan
from mpitrain.collectives.reduction import Reduction
from mpitrain.memory import ReduceOp, SharedDeviceArray, parse_op

__all__ = ["plan_in_device_memory"]


def plan_in_device_memory(
    context: Context, make_plan: Callable[..., Plan[Any]], arguments: Sequence[Any], options: dict[str, Any]
) -> Plan[Any] | None:
    """Prepare a collective by load and store in the memory of devices; None for one that cannot be run so.

    Arguments and errors as of `on_device.DeviceArrays.plan`.
    """
    if make_plan is operations.plan_allreduce and options.get("in_place", False):
        (array,) = arguments
        if isinstance(array, SharedDeviceArray) and context.shares(array):
            return _plan_direct(context, array, **options)
    return None


def _plan_direct(
    context: Context,
    array: SharedDeviceArray,
    *,
    op: str | ReduceOp = "sum",
    algorithm: str = "auto",
    blocking: bool = True,
    in_place: bool,
    parts: Sequence[int] | None = None,
) -> Plan[SharedDeviceArray] | None:
    """Prepare an all-reduce by load and store in the memory of devices; None if another algorithm is asked for."""
    del in_place
    if parts is not None or parse_op(op) is ReduceOp.ADASUM:
        return None
    op = context.check_reduction("allreduce", op, array.dtype)
    if algorithm == "auto":
        algorithm = context.settings.algorithm
    nbytes = array.flat.nbytes
    name = context.choose("allreduce", algorithm, nbytes, blocking=blocking, in_window=True, on_device=True)
    if name != context.available.shared:
        return None
    run = DeviceRun(array)
    reduction = Reduction(array.dtype, op, context.size)

    def task(call: Call) -> Task[SharedDeviceArray]:
        yield from context.run_on_device(array, reduction, call, run)
        return array

    description = f"allreduce {op.name.lower()} of {array.dtype} {list(array.shape)} by {name} in device memory"
    description += context.place_of(array)
    return Plan(description, task, uses_flags=True, nbytes=nbytes, enter=run.enter, leave=run.leave)
