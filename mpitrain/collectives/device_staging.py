"""All-reduces of ordinary device arrays through device memory that the node shares, in pieces.

A piece is copied into that memory, reduced there as `device_direct` does, and copied back. All of it is queued on one
stream, so that a piece follows the one before without further events: the host only tells the other ranks by flags what
it has queued, while the device is still at work on earlier pieces.

The memory is made by the first operation that needs it, once all ranks are known to bring device arrays. If it is not
to be had, all ranks learn so together, and go by way of the host from then on.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any, Literal

from mpitrain.collectives.agreement import exchange_rows
from mpitrain.collectives.context import Context
from mpitrain.collectives.device_direct import NUM_EVENTS, check_kernels, queue_allreduce
from mpitrain.collectives.executor import Task
from mpitrain.collectives.plan import THROUGH_DEVICES, Call, Plan
from mpitrain.collectives.reduction import Reduction
from mpitrain.collectives.selection import DIRECT
from mpitrain.errors import UnavailableError
from mpitrain.memory import FlatArray, Place, ReduceOp, SharedDeviceArray, dtype_named, parse_op
from mpitrain.memory.device import (
    CallersStream,
    DeviceBlock,
    Event,
    hand_over,
    is_done,
    mapping_device_memory,
)

__all__ = ["DeviceStaging"]

_MEMORY_NBYTES = 64 << 20
# What ranks tell each other about their memory takes less.
_ROW_NBYTES = 8192


class DeviceStaging:
    """The device memory of a communicator through which arrays pass.

    Args:
        context: Of the communicator.
        tell: Called with the reason if there is no such memory.
    """

    def __init__(self, context: Context, tell: Callable[[str], None]) -> None:
        self._context = context
        self._tell = tell
        # Where an operation of the host would be brought to a meeting, the device gains nothing.
        self._least_nbytes = 0 if context.meeting is None else context.meeting.slot_nbytes + 1
        settings = context.settings
        self.is_possible = context.available.shared == DIRECT and settings.check and settings.shared_device_memory
        # Whether there is no such memory: known in the turn of a call that needs it, so the same on all ranks.
        self._has_failed = False
        self._memory: SharedDeviceArray | None = None
        # Pieces so far, the same on all ranks.
        self._pieces = 0

    def takes(self, view: FlatArray, *, op: Any = "sum", algorithm: str = "auto", parts: Any = None, **_: Any) -> bool:
        """Whether an all-reduce is done so; the same on all ranks that bring arrays of devices."""
        if algorithm == "auto":
            algorithm = self._context.settings.algorithm
        return (
            self.is_possible
            and view.nbytes >= self._least_nbytes
            and algorithm in ("auto", DIRECT)
            and parts is None
            and parse_op(op) is not ReduceOp.ADASUM
        )

    def plan(
        self, view: FlatArray, caller: CallersStream, fall_back: Callable[[], Plan[Any]], *, op: Any = "sum", **_: Any
    ) -> Plan[Any]:
        """Prepare an all-reduce in place.

        Args:
            view: Of the array.
            caller: The stream of who calls.
            fall_back: Makes the plan that is run where there is no such memory.
            op: Same on every rank.
        """
        context = self._context
        reduction = Reduction(view.dtype, context.check_reduction("allreduce", op, view.dtype), context.size)
        ends: list[Event] = []

        def task(call: Call) -> Task[Any]:
            while not context.staging_order.may_start(call.staging_ticket):
                yield False
            if not (yield from self._is_there(call, caller.device)):
                plan = fall_back()
                if plan.prepare is not None:
                    yield from plan.prepare()
                return (yield from plan.task(call))
            ends[:] = [(yield from self._run(view, reduction, call, caller))]
            while call.blocking and not is_done(ends[0]):
                yield False
            return view.owner

        def leave() -> None:
            if ends:
                hand_over(view.owner, ends[0])

        description = (
            f"allreduce {reduction.op.name.lower()} of {view.dtype} {list(view.shape)} by {DIRECT}, {THROUGH_DEVICES}"
        )
        return Plan(
            description, task, uses_staging=True, uses_flags=True, nbytes=view.nbytes, leave=leave, fallback=fall_back
        )

    def _run(self, view: FlatArray, reduction: Reduction, call: Call, caller: CallersStream) -> Task[Event]:
        assert self._memory is not None
        assert self._context.node is not None
        streams = self._memory.streams
        streams.compute.wait_event(caller.ready)
        piece_count = _MEMORY_NBYTES // view.dtype.itemsize
        for piece, first in enumerate(range(0, view.count, piece_count)):
            mine = view.data[first : first + piece_count]
            part = self._memory.part(view.dtype, 0, mine.size)
            streams.copy(part.flat, mine, streams.compute)
            turn, self._pieces = self._pieces, self._pieces + 1
            yield from queue_allreduce(
                self._context.node, part, reduction, call.number + 1, piece, turn=turn, across=None
            )
            streams.copy(mine, part.flat, streams.compute)
        return streams.record(streams.compute)

    def _is_there(self, call: Call, device: int) -> Task[bool]:
        """Make the memory if it is not there; whether it is, which is the same on all ranks."""
        if self._memory is None and not self._has_failed:
            problem = yield from self._make(call, device)
            if problem:
                self.is_possible, self._has_failed = False, True
                self._tell(problem)
        return self._memory is not None

    def _make(self, call: Call, device: int) -> Task[str]:
        context = self._context
        assert context.node is not None
        rank = context.node.rank
        steps = mapping_device_memory(rank, _MEMORY_NBYTES, NUM_EVENTS, device)
        problem = ""
        try:
            value = next(steps)
            while True:
                value = steps.send((yield from self._share(value, call)))
        except StopIteration as stop:
            block: DeviceBlock = stop.value
        except UnavailableError as error:
            return str(error)
        holdings = block.holdings

        def close() -> Callable[[], None] | Literal[False]:
            self.is_possible, self._has_failed, self._memory = False, True, None
            return holdings.close()

        context.close_owned.append(close)
        try:
            check_kernels(block.views[rank])
        except (UnavailableError, RuntimeError, MemoryError) as error:
            problem = str(error) or type(error).__name__
        if problems := [text for text in (yield from self._share(problem, call)) if text]:
            return str(problems[0])
        dtype = dtype_named("uint8")
        views = block.typed(dtype.storage, 0, _MEMORY_NBYTES)
        # Nobody else gets it, so it needs no number.
        place = Place(context.memory.sharers, 0, 0)
        self._memory = SharedDeviceArray(dtype, (_MEMORY_NBYTES,), views, rank, place, block=block)
        return ""

    def _share(self, value: Any, call: Call) -> Task[list[Any]]:
        # A problem may be a long text; the rest is not.
        data = pickle.dumps(value[: _ROW_NBYTES // 8] if isinstance(value, str) else value)
        rows = yield from exchange_rows(self._context, data, _ROW_NBYTES, call)
        return [pickle.loads(row) for row in rows]
