"""Quick all-reduces of ordinary arrays in memory, once the node's ranks have met."""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

from mpitrain.collectives.context import Context
from mpitrain.collectives.executor import Task
from mpitrain.collectives.plan import Call
from mpitrain.collectives.quick import Caller, Quick
from mpitrain.collectives.reduction import Reduction

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
        self._reduction = reduction

    def _come(self, _data: NDArray[Any], /) -> None:
        self._meeting.arrive(self._digest)

    def _reduce(self, data: NDArray[Any], total: NDArray[Any], index: int) -> None:
        context = self._context
        ticket = context.staging_order.take_ticket()
        context.flag_users.enter(index)
        call = self._caller.call_of(index)._replace(staging_ticket=ticket)
        if (recorder := self._caller.engine.recorder) is not None:
            call = call._replace(trace=recorder.operation(self._description))
        if not data.flags.c_contiguous:  # peers read it in one piece
            total[:] = data
            data = total
        try:
            self._meet(data, index)
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

    def _record(self, began_ns: int) -> None:
        """The trace of the call has it."""
