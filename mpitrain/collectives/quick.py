"""Blocking all-reduces like one before, without making a plan, which for small arrays would be most of the time.

The first all-reduce of a signature goes the general way (`operations.allreduce`). Later ones do the same exchange with
less ado; a rank may go either way without the others noticing.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mpitrain.collectives.agreement import FALL_BACK, digest_of, explain
from mpitrain.collectives.calls import Calls
from mpitrain.collectives.context import Context
from mpitrain.collectives.executor import Task
from mpitrain.collectives.meeting import DIGEST, LINE
from mpitrain.collectives.peers import PeerWatch, text_of
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
    calls: Calls
    watch: PeerWatch

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
        shape: Of the arrays; all are contiguous.
        description: As in the plan.

    Attributes:
        run: `run(data, result)` reduces `data` into `result`, which may be the same, or if left out a new array, and
            returns it. It raises what every collective does.
    """

    def __init__(
        self, context: Context, caller: Caller, small: SmallAllreduce, shape: tuple[int, ...], description: str
    ) -> None:
        assert context.meeting is not None
        self._context = context
        self._caller = caller
        self._small = small
        self._meeting = context.meeting
        self._description = description
        self._digest = digest_of(description)
        self.run: Callable[..., NDArray[Any]] = self._run_whole(shape) if small.is_whole else self._run_in_slices

    def _run_whole(self, shape: tuple[int, ...]) -> Callable[..., NDArray[Any]]:  # noqa: C901, PLR0915
        """Return `run` for arrays that every rank reduces whole.

        Of an exchange of a few bytes most is the Python in between. So this is one function, which does what
        `Calls.begin`, `Meeting` and `SmallAllreduce` do, and has at hand what it needs. No lock: what another thread
        calls meanwhile has no order among the calls that other ranks could share.
        """
        caller, meeting, small = self._caller, self._meeting, self._small
        calls, watch, engine = caller.calls, caller.watch, caller.engine
        nbytes, digest, own, others = small.nbytes, self._digest, meeting.own, meeting.others
        fence = meeting.fence if meeting.needs_fence else None
        polls = _POLLS if engine.spin_waiting else 1
        (place_0, place_1), (reduce_0, reduce_1) = small.own(shape), small.reducers(shape)

        def run(data: NDArray[Any], result: NDArray[Any] | None = None) -> NDArray[Any]:  # noqa: C901, PLR0912
            began_ns = 0 if engine.recorder is None else time.monotonic_ns()
            index = calls.number
            if watch.revoked is not None:
                watch.check(index)
            calls.number = index + 1
            calls.nbytes += nbytes
            try:
                meeting.number = number = meeting.number + 1
                if number & 1:
                    place_1[...] = data
                    reduce, flag = reduce_1, LINE
                else:
                    place_0[...] = data
                    reduce, flag = reduce_0, 0
                own[flag + DIGEST] = digest
                if fence is not None:
                    fence()
                own[flag] = number
                agrees = True
                for flags in others:
                    if flags[flag] != number:
                        left = polls
                        while flags[flag] != number and left:
                            left -= 1
                        agrees = agrees and left > 0
                if fence is not None:
                    fence()
                if agrees:
                    for flags in others:
                        if flags[flag + DIGEST] != digest:
                            agrees = False
                if not agrees:
                    reduce = (reduce_0, reduce_1)[self._come_again(data, index)]
                total = reduce() if result is None else reduce(result)
            except BaseException as error:
                self._fail(error, index)
                raise
            if began_ns:
                self._record(began_ns)
            return total

        return run

    def _fail(self, error: BaseException, index: int) -> None:
        if not isinstance(error, CollectiveMismatchError):  # of that all ranks know
            self._caller.give_up(f"{self._description}: {text_of(error)}", index)

    def _record(self, began_ns: int) -> None:
        if (recorder := self._caller.engine.recorder) is not None:
            recorder.add("allreduce", began_ns, time.monotonic_ns(), self._description)

    def _run_in_slices(self, data: NDArray[Any], result: NDArray[Any] | None = None) -> NDArray[Any]:
        caller, small = self._caller, self._small
        calls = caller.calls
        began_ns = 0 if caller.engine.recorder is None else time.monotonic_ns()
        index = calls.number
        caller.watch.check(index)
        calls.number = index + 1
        calls.nbytes += small.nbytes
        try:
            total = np.empty_like(data) if result is None else result
            flat = data.reshape(-1)
            small.bring(flat)
            self._meeting.arrive(self._digest)
            self._come_again(flat, index)
            caller.drive(small.take(flat, total.reshape(-1)), self._description, index)
        except BaseException as error:
            self._fail(error, index)
            raise
        if began_ns:
            self._record(began_ns)
        return total

    def _come_again(self, data: NDArray[Any], index: int) -> int:
        """Return the slot of the meeting to which some are late, or of a later one to which all bring the like."""
        while not self._wait(index):
            self._small.bring(data.reshape(-1))
            self._meeting.arrive(self._digest)
        return self._meeting.slot

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
    """The signatures that a communicator has seen.

    Attributes:
        of_arrays: For NumPy arrays by (dtype, shape, op, algorithm), how to reduce into a new array.
        of_arrays_in_place: The same, in place.
    """

    def __init__(self) -> None:
        self.of_arrays: dict[Any, QuickAllreduce] = {}
        self.of_arrays_in_place: dict[Any, QuickAllreduce] = {}
        self._of_others: dict[Any, QuickAllreduce] = {}

    def find(self, array: Any, op: Any, algorithm: str, *, in_place: bool) -> tuple[QuickAllreduce | None, Any]:
        """Return how to reduce `array`, which is no NumPy array, and a view of it as a flat one.

        None where it has to go the general way.
        """
        kind: Any = type(array)
        if kind is SharedArray:
            kind = array.place
        try:
            quick = self._of_others[kind, array.dtype, array.shape, op, algorithm, in_place]
        except (AttributeError, KeyError, TypeError):
            return None, array
        host = array.flat if type(array) is SharedArray else _host(array)
        # Contiguous, aligned and writable; what is not gets its error, or its copy, on the general way.
        if host is None or not host.flags.carray:
            return None, array
        return quick, host.reshape(-1)

    def remember(self, array: Any, op: Any, algorithm: str, quick: QuickAllreduce, *, in_place: bool) -> None:
        """Find it from now on, if the kind of array is one that can be looked at quickly."""
        if type(array) is np.ndarray:
            known = self.of_arrays_in_place if in_place else self.of_arrays
            _keep(known, (array.dtype, array.shape, op, algorithm), quick)
        elif type(array) is SharedArray:
            # Other ranks may pass another one of the same shape, which they must not.
            _keep(self._of_others, (array.place, array.dtype, array.shape, op, algorithm, in_place), quick)
        elif _host(array) is not None:
            _keep(self._of_others, (type(array), array.dtype, array.shape, op, algorithm, in_place), quick)


def _keep(known: dict[Any, QuickAllreduce], signature: tuple[Any, ...], quick: QuickAllreduce) -> None:
    if len(known) >= _MOST_SIGNATURES:
        known.clear()
    known[signature] = quick


def _host(array: Any) -> NDArray[Any] | None:
    """Return a torch CPU tensor as a NumPy array over the same memory; None for what is no such thing."""
    torch = loaded_torch()
    if torch is None or not isinstance(array, torch.Tensor) or not array.is_cpu or array.dtype is torch.bfloat16:
        return None
    try:
        return array.detach().numpy()  # type: ignore[no-any-return]
    except (RuntimeError, TypeError):
        return None
