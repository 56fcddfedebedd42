"""Blocking all-reduces like one before, without making a plan, which for small arrays would be most of the time.

The first all-reduce of a signature goes the general way (`operations.allreduce`). Later ones do the same exchange with
less ado; a rank may go either way without the others noticing.
"""

from __future__ import annotations

import abc
import time
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mpitrain.collectives.agreement import FALL_BACK, digest_of, explain
from mpitrain.collectives.calls import Calls
from mpitrain.collectives.context import Context
from mpitrain.collectives.executor import Task
from mpitrain.collectives.peers import PeerWatch, text_of
from mpitrain.collectives.plan import Call
from mpitrain.collectives.progress import ProgressEngine
from mpitrain.errors import CollectiveMismatchError

__all__ = ["Caller", "Quick"]

# Polls before a waiting rank goes the way that looks after failed peers and gives the core away.
_POLLS = 100


class Caller(Protocol):
    """What makes calls on a communicator."""

    engine: ProgressEngine
    calls: Calls
    watch: PeerWatch

    def drive(self, task: Task[Any], description: str, index: int) -> Any:
        """Run a task of a call to its end."""

    def call_of(self, index: int) -> Call:
        """Return the blocking call of a number."""


class Quick(abc.ABC):
    """All-reduces of one signature, between ranks of one node.

    Args:
        context: Of the communicator.
        caller: Makes its calls.
        nbytes: Of an array.
        description: As in the plan.
    """

    def __init__(self, context: Context, caller: Caller, nbytes: int, description: str) -> None:
        assert context.meeting is not None
        self._context = context
        self._caller = caller
        self._meeting = context.meeting
        self._nbytes = nbytes
        self._description = description
        self._digest = digest_of(description)
        self._polls = _POLLS if caller.engine.spin_waiting else 1

    def run(self, data: NDArray[Any], result: NDArray[Any] | None = None) -> NDArray[Any] | None:
        """Reduce `data` into a contiguous `result`, which may be the same, or a new array if left out; return it.

        None if there is no room for a new array: the general way tells the other ranks.

        Raises:
            CollectiveMismatchError, CommError: As every collective.
        """
        try:
            total = np.empty(data.shape, data.dtype) if result is None else result
        except MemoryError:
            return None
        began_ns = 0 if self._caller.engine.recorder is None else time.monotonic_ns()
        index = self._begin()
        try:
            flat = data.reshape(-1)
            self._reduce(flat, flat if total is data else total.reshape(-1), index)
        except BaseException as error:
            self._fail(error, index)
            raise
        if began_ns:
            self._record(began_ns)
        return total

    @abc.abstractmethod
    def _reduce(self, data: NDArray[Any], total: NDArray[Any], index: int) -> None:
        """Reduce flat arrays, after a meeting; they may be one and the same object."""

    @abc.abstractmethod
    def _come(self, data: NDArray[Any], total: NDArray[Any], /) -> None:
        """Come to the next meeting, with whatever this rank brings to it; arguments as for `_reduce`."""

    def _begin(self) -> int:
        """Return the number of the call that begins.

        No lock: what another thread calls meanwhile has no order among the calls that other ranks could share.
        """
        calls = self._caller.calls
        index = calls.number
        self._caller.watch.check(index)
        calls.number = index + 1
        calls.nbytes += self._nbytes
        return index

    def _fail(self, error: BaseException, index: int) -> None:
        if not isinstance(error, CollectiveMismatchError):  # of that all ranks know
            self._caller.watch.give_up(f"{self._description}: {text_of(error)}", index)

    def _record(self, began_ns: int) -> None:
        if (recorder := self._caller.engine.recorder) is not None:
            recorder.add("allreduce", began_ns, time.monotonic_ns(), self._description)

    def _meet(self, data: NDArray[Any], total: NDArray[Any], index: int) -> None:
        """Come to the next meeting, and wait until all have and mean the same."""
        self._come(data, total)
        meeting = self._meeting
        for _ in range(self._polls):
            if meeting.is_complete():
                if meeting.agrees():
                    return
                break
        self._come_again(data, total, index)

    def _come_again(self, data: NDArray[Any], total: NDArray[Any], index: int) -> None:
        """Wait for those who are late to a meeting, or for a later one to which all bring arrays in the like memory.

        Raises:
            CollectiveMismatchError: They do not mean the same.
        """
        while True:
            self._caller.drive(self._meeting.wait(), self._description, index)
            if self._meeting.agrees():
                return
            call = self._caller.call_of(index)
            message = self._caller.drive(explain(self._context, self._description, call), self._description, index)
            if message != FALL_BACK:
                raise CollectiveMismatchError(message)
            self._come(data, total)
