"""Quick all-reduces of ordinary arrays in memory, once the node's ranks have met."""

from __future__ import annotations

import time
from typing import Any

from numpy.typing import NDArray

from mpitrain.collectives.context import Context
from mpitrain.collectives.direct import EMPTIED, REDUCED, keeping, wait
from mpitrain.collectives.executor import Task
from mpitrain.collectives.node import SHOWN
from mpitrain.collectives.plan import Call
from mpitrain.collectives.quick import Caller, Quick
from mpitrain.collectives.reading import Reading, addresses_of
from mpitrain.collectives.reduction import Reduction
from mpitrain.collectives.selection import LEAST_READ_NBYTES

__all__ = ["QuickOrdinary"]


class QuickOrdinary(Quick):
    """See `Quick`. A result of its own is written without a copy of the array before.

    Args:
        context: Of the communicator.
        caller: Makes its calls.
        reduction: Same on every rank.
        nbytes: Of an array.
        description: As in the plan.
    """

    def __init__(self, context: Context, caller: Caller, reduction: Reduction, nbytes: int, description: str) -> None:
        super().__init__(context, caller, nbytes, description)
        assert context.node is not None
        self._reduction = reduction
        self._node = context.node
        self._reads = context.node.cross_memory is not None and nbytes >= LEAST_READ_NBYTES

    def _come(self, _data: NDArray[Any], _total: NDArray[Any], /) -> None:
        self._meeting.arrive(self._digest)

    def _reduce(self, data: NDArray[Any], total: NDArray[Any], index: int) -> None:
        context = self._context
        ticket = context.staging_order.take_ticket()
        context.flag_users.enter(index)
        call = self._caller.call_of(index)._replace(staging_ticket=ticket)
        recorder = self._caller.engine.recorder
        if recorder is not None:
            call = call._replace(trace=recorder.operation(self._description))
        if not data.flags.c_contiguous:  # peers read it in one piece
            total[:] = data
            data = total
        try:
            if recorder is None and self._reads and context.flag_users.has_turn(index):
                if self._read(data, total, index):
                    return
            else:
                self._meet(data, total, index)
            task = self._task(data, total, call)
            self._caller.drive(task if call.trace is None else call.trace.watch(task), self._description, index)
        finally:
            if call.trace is not None:
                call.trace.end()
            context.staging_order.give_back(ticket)
            context.flag_users.leave(index)

    def _task(self, data: NDArray[Any], total: NDArray[Any], call: Call) -> Task[None]:
        yield from self._context.flag_users.turn(call.number)
        yield from self._context.run_ordinary(data, total, self._reduction, call)

    def _read(self, data: NDArray[Any], total: NDArray[Any], index: int) -> bool:
        """Meet, and do what `read_allreduce` does, without its tasks; whether all ranks could read.

        A few steps take as long as a megabyte that is read.
        """
        node, flags, number = self._node, self._node.flags, index + 1
        # Before the meeting, after which those have seen it who do the same.
        flags.show(number, *addresses_of(data, total))
        self._meet(data, total, index)
        began_ns = time.monotonic_ns()
        driven_ns = self._await(SHOWN, number, index)
        shown = flags.shown(number)
        assert shown is not None
        if not all(map(all, shown)):
            return False
        reading = Reading(node, data, total, shown, self._reduction, across=None)
        for _ in reading.reduce(0, total.size):
            pass
        flags.signal(REDUCED, number)
        driven_ns += self._await(REDUCED, number, index)
        for _ in reading.collect(0, total.size):
            pass
        with keeping(flags, EMPTIED, number):
            driven_ns += self._await(EMPTIED, number, index)
        self._caller.engine.book_blocking(began_ns + driven_ns)
        return True

    def _await(self, phase: int, number: int, index: int) -> int:
        """Wait until all ranks have ended a phase; return how many nanoseconds of that are counted already."""
        for _ in range(self._polls):
            if self._node.flags.reached(phase, number):
                return 0
        began_ns = time.monotonic_ns()
        self._caller.drive(wait(self._node.flags, phase, number), self._description, index)
        return time.monotonic_ns() - began_ns

    def _record(self, began_ns: int) -> None:
        """The trace of the call has it."""
