"""Collectives on device arrays: in device memory that the node shares, else straight to MPI, else by way of the host.

Straight to MPI they go if that is CUDA-aware on all ranks; see `awareness`.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

from mpitrain.collectives import operations
from mpitrain.collectives.awareness import find_awareness
from mpitrain.collectives.context import Context
from mpitrain.collectives.device_plans import plan_in_device_memory
from mpitrain.collectives.device_staging import DeviceStaging
from mpitrain.collectives.plan import STRAIGHT, THROUGH_DEVICES, Plan
from mpitrain.collectives.staged import STAGED, Staged, StagedRun, Use, plan_staged
from mpitrain.collectives.straight import goes_straight, plan_straight
from mpitrain.collectives.table_file import Machine
from mpitrain.comm import Topology, Transport
from mpitrain.comm.cuda_aware import CudaAwareness
from mpitrain.config import Settings
from mpitrain.memory import FlatArray, copy_of, flat_view, is_on_device
from mpitrain.memory.device import CallersStream, device_of

__all__ = ["DeviceArrays"]

_log = logging.getLogger("mpitrain")


class DeviceArrays:
    """How the device arrays of one rank take part in the collectives of a communicator.

    Args:
        context: Of the communicator.
        topology: Of its ranks.
    """

    def __init__(self, context: Context, topology: Topology) -> None:
        self._context = context
        self._local_rank = topology.local_rank
        self._awareness: CudaAwareness | None = None
        self._staging = DeviceStaging(context, functools.partial(_tell_unshared, context.rank))

    def plan(self, make_plan: Callable[..., Plan[Any]], arguments: Sequence[Any], options: dict[str, Any]) -> Plan[Any]:
        """Prepare a collective of which at least one array lies on a device, in the caller's thread.

        Args:
            make_plan: Prepares it on the host.
            arguments: The arrays.
            options: Others.

        Raises:
            ValueError, TypeError: Bad argument; also an array on the device of another rank.
            UnavailableError: CuPy, or what it needs, is missing.
            MemoryError: The device has no room for the result.
        """
        if (plan := plan_in_device_memory(self._context, make_plan, arguments, options)) is not None:
            return plan
        if make_plan in (operations.plan_allreduce, operations.plan_broadcast) and not options.get("in_place", False):
            arguments = [copy_of(arguments[0])]
            options = {**options, "in_place": True}
        on_device = [flat_view(array) for array in arguments if is_on_device(array)]
        for view in on_device:
            self._check_device(view)
        caller = CallersStream(on_device[0].owner)

        def staged() -> Plan[Any]:
            return plan_staged(self._context, make_plan, arguments, options, caller)

        # The root's array of a scatter is no array elsewhere.
        are_all = len(on_device) == sum(array is not None for array in arguments)
        if make_plan is operations.plan_allreduce and self._staging.takes(on_device[0], **options):
            plan = self._staging.plan(on_device[0], caller, self._falling_back(staged), **options)
            return dataclasses.replace(plan, enter=caller.enter)
        if not (are_all and self._is_straight() and goes_straight(self._context, make_plan, options)):
            plan = staged()
            return dataclasses.replace(plan, enter=_each(caller.enter, plan.enter))
        plan = plan_straight(self._context, make_plan, arguments, options, caller)
        return dataclasses.replace(plan, enter=caller.enter, fallback=self._falling_back(staged))

    def stage(self, views: Sequence[FlatArray], *, in_place: bool) -> StagedRun:
        """Begin to copy device arrays to the host, for an operation that is made of the host's collectives.

        In the caller's thread.

        Args:
            views: Of arrays that are all on this rank's device.
            in_place: Whether they get the results.

        Raises:
            ValueError: An array on the device of another rank.
            UnavailableError: CuPy, or what it needs, is missing.
        """
        for view in views:
            self._check_device(view)
        use = Use("array", reads=True, writes=in_place, is_result=in_place)
        staged = [Staged(self._context, view, use) for view in views]
        run = StagedRun(self._context, staged, CallersStream(views[0].owner))
        run.begin()
        return run

    def stage_from_now_on(self) -> None:
        """Some rank's arrays lie on the host, or go by way of it, so all do from now on."""
        self._staging.is_possible = False
        self._tell(CudaAwareness(is_aware=False, source="another rank's memory is the host's, or goes by way of it"))

    def _falling_back(self, staged: Callable[[], Plan[Any]]) -> Callable[[], Plan[Any]]:
        def fall_back() -> Plan[Any]:
            plan = staged()
            # The caller's stream has been taken note of when the call was made.
            assert plan.enter is not None
            plan.enter()
            return plan

        return fall_back

    def _is_straight(self) -> bool:
        """Find out, once, whether this rank's device memory goes straight to MPI; it does if there is nobody else."""
        if self._context.size == 1:
            return True
        if self._awareness is None:
            self._tell(_awareness(self._context.transport, self._context.settings, device_of(self._local_rank)))
        assert self._awareness is not None
        return self._awareness.is_aware

    def _tell(self, found: CudaAwareness) -> None:
        if self._awareness is None or self._awareness.is_aware != found.is_aware:
            self._awareness = found
            if self._context.rank == 0:
                if found.is_aware:
                    _log.info("device arrays go %s: %s", STRAIGHT, found.source)
                else:
                    _log.warning("device arrays are %s: %s", STAGED, found.source)

    def _check_device(self, view: FlatArray) -> None:
        number = device_of(self._local_rank)
        if view.device != f"cuda:{number}":
            raise ValueError(
                f"array: must be on this rank's device, got {view.device} where local rank {self._local_rank} has "
                f"cuda:{number}; move it, and call torch.cuda.set_device({number}) before making tensors"
            )


def _awareness(transport: Transport, settings: Settings, device: int) -> CudaAwareness:
    if transport.native is None:
        return CudaAwareness(is_aware=False, source="ranks are threads")
    # Only ranks that compare what they bring learn of others whose memory is the host's.
    if settings.cuda_aware == "auto" and not settings.check:
        return CudaAwareness(
            is_aware=False, source="MPITRAIN_CHECK=0, so ranks cannot agree; MPITRAIN_CUDA_AWARE=yes does"
        )
    return find_awareness(Machine.here(transport), settings, device)


def _each(*functions: Callable[[], None] | None) -> Callable[[], None]:
    def call() -> None:
        for function in functions:
            if function is not None:
                function()

    return call


def _tell_unshared(rank: int, problem: str) -> None:
    if rank == 0:
        _log.warning("%s; ordinary device arrays do not go %s", problem, THROUGH_DEVICES)
