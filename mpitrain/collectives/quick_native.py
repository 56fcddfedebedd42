"""Quick all-reduces by the MPI library's own, once the node's ranks have met."""

from __future__ import annotations

import time
from typing import Any

from numpy.typing import NDArray

from mpitrain.collectives.context import Context
from mpitrain.collectives.executor import Task
from mpitrain.collectives.quick import Caller, Quick
from mpitrain.collectives.reduction import Reduction
from mpitrain.errors import CollectiveMismatchError

__all__ = ["QuickNative"]


class QuickNative(Quick):
    """See `Quick`.

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
        self._allreduce = context.transport.native.allreduce

    def _come(self, data: NDArray[Any], total: NDArray[Any], /) -> None:
        # MPI reduces from one array into another on all ranks or on none.
        self._meeting.arrive(self._digest, is_marked=data is not total and data.flags.carray)

    def _reduce(self, data: NDArray[Any], total: NDArray[Any], index: int) -> None:
        order = self._context.native_order
        ticket = order.take_ticket()
        try:
            self._meet(data, total, index)
        except CollectiveMismatchError:
            order.give_back(ticket)
            raise
        if not order.may_start(ticket):
            self._caller.drive(self._turn(ticket), self._description, index)
        began_ns = time.monotonic_ns()
        source = data if self._meeting.is_marked() else None
        if source is None and data is not total:
            total[:] = data
        self._allreduce(total, self._reduction.dtype, self._reduction.op, blocking=True, source=source)
        self._caller.engine.book_blocking(began_ns)
        # Not where it has failed since: a later collective would take the turn of this one on the other ranks.
        order.give_back(ticket)
        self._reduction.finish(total)

    def _turn(self, ticket: int) -> Task[None]:
        while not self._context.native_order.may_start(ticket):
            yield False
