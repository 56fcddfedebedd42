"""Blocking all-reduces like one before, without making a plan, which for small arrays would be most of the time.

The first all-reduce of a signature goes the general way (`operations.allreduce`). Later ones do the same exchange with
less ado; a rank may go either way without the others noticing.
"""

from __future__ import annotations

import time
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mpitrain.collectives.agreement import FALL_BACK, digest_of, explain
from mpitrain.collectives.context import Context
from mpitrain.collectives.executor import Task
from mpitrain.collectives.peers import text_of
from mpitrain.collectives.plan import Call
from mpitrain.collectives.progress import ProgressEngine
from mpitrain.collectives.small import SmallAllreduce
from mpitrain.errors import CollectiveMismatchError
from mpitrain.memory import SharedArray
from mpitrain.memory.loaded import loaded_torch

__all__ = ["Caller", "QuickAllreduce", "QuickCalls"]

# Signatures that are remembered; beyond, all are forgotten.
_MOST_SIGNATURES = 512
# Polls before a waiting rank goes the way that looks after failed peers and gives the core away.
_POLLS = 100


class Caller(Protocol):
    """What makes calls on a communicator."""

    engine: ProgressEngine

    def take_number(self, nbytes: int) -> int:
        """Return the number of the next call, which begins now."""

    def give_up(self, reason: str, index: int) -> None:
        """Give the communicator up."""

    def drive(self, task: Task[Any], description: str, index: int) -> Any:
        """Run a task of a call to its end."""

    def call_of(self, index: int) -> Call:
        """Return the blocking call of a number."""


class QuickAllreduce:
    """All-reduces of one signature.

    Args:
        context: Of the communicator.
        caller: The communicator.
        small: Does the work.
        description: As in the plan.
        spin: Whether a waiting rank may poll.
    """

    def __init__(
        self, context: Context, caller: Caller, small: SmallAllreduce, description: str, *, spin: bool
    ) -> None:
        assert context.meeting is not None
        self._context = context
        self._caller = caller
        self._small = small
        self._meeting = context.meeting
        self._description = description
        self._digest = digest_of(description)
        self._polls = _POLLS if spin else 1

    def run(self, data: NDArray[Any], result: NDArray[Any]) -> None:
        """Reduce flat `data` into flat `result`, which may be the same.

        Raises:
            CollectiveMismatchError, CommError: As every collective.
        """
        small, meeting = self._small, self._meeting
        recorder = self._caller.engine.recorder
        began_ns = 0 if recorder is None else time.monotonic_ns()
        index = self._caller.take_number(data.nbytes)
        try:
            if small.is_whole:
                while not meeting.come(self._digest, small.own, data, self._polls):
                    if self._wait(index):
                        break
                small.take_whole(result)
            else:
                while True:
                    small.bring(data)
                    meeting.arrive(self._digest)
                    if self._wait(index):
                        break
                self._caller.drive(small.take(data, result), self._description, index)
        except CollectiveMismatchError:
            raise  # all ranks know
        except BaseException as error:
            self._caller.give_up(f"{self._description}: {text_of(error)}", index)
            raise
        if recorder is not None:
            recorder.add("allreduce", began_ns, time.monotonic_ns(), self._description)

    def _wait(self, index: int) -> bool:
        """Wait until all have come; whether they mean the same, and not only other memory.

        Raises:
            CollectiveMismatchError: They do not.
        """
        self._caller.drive(self._meeting.wait(), self._description, index)
        if self._meeting.agrees():
            return True
        call = self._caller.call_of(index)
        message = self._caller.drive(explain(self._context, self._description, call), self._description, index)
        if message != FALL_BACK:
            raise CollectiveMismatchError(message)
        return False


class QuickCalls:
    """The signatures that a communicator has seen."""

    def __init__(self) -> None:
        self._known: dict[Any, QuickAllreduce] = {}

    def find(self, array: Any, op: Any, algorithm: str, *, in_place: bool) -> tuple[QuickAllreduce | None, Any]:
        """Return how to reduce `array`, and a flat view of it; None where it has to go the general way."""
        kind: Any = type(array)
        if kind is SharedArray:
            kind = array.place
        try:
            quick = self._known[kind, array.dtype, array.shape, op, algorithm, in_place]
        except (AttributeError, KeyError, TypeError):
            return None, array
        host = array if kind is np.ndarray else array.flat if type(array) is SharedArray else _host(array)
        # Contiguous, aligned and writable; what is not gets its error, or its copy, on the general way.
        if host is None or not host.flags.carray:
            return None, array
        return quick, host if host.ndim == 1 else host.reshape(-1)

    def remember(self, array: Any, op: Any, algorithm: str, quick: QuickAllreduce, *, in_place: bool) -> None:
        """Find it from now on, if the kind of array is one that can be looked at quickly."""
        kind: Any = type(array)
        if kind is SharedArray:
            # Other ranks may pass another one of the same shape, which they must not.
            kind = array.place
        elif kind is not np.ndarray and _host(array) is None:
            return
        if len(self._known) >= _MOST_SIGNATURES:
            self._known.clear()
        self._known[kind, array.dtype, array.shape, op, algorithm, in_place] = quick


def _host(array: Any) -> NDArray[Any] | None:
    """Return a torch CPU tensor as a NumPy array over the same memory; None for what is no such thing."""
    torch = loaded_torch()
    if torch is None or not isinstance(array, torch.Tensor) or not array.is_cpu or array.dtype is torch.bfloat16:
        return None
    try:
        return array.detach().numpy()  # type: ignore[no-any-return]
    except (RuntimeError, TypeError):
        return None
