"""Operations in flight, and the one thread that advances them all.

Each operation is a task (see `collectives.executor`). The thread advances all of them in turn and never
blocks inside one, so operations that were started in different order, or on different communicators, never
wait for each other. A thread that waits for a handle advances them itself meanwhile, which saves the hand-over.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

from mpitrain.collectives.calls import Calls
from mpitrain.collectives.executor import Task
from mpitrain.collectives.progress_thread import ProgressThread
from mpitrain.comm import Backoff, Topology
from mpitrain.config import Settings
from mpitrain.errors import CommTimeoutError
from mpitrain.observe import CommunicationClock, CommunicationCounters, Recorder

__all__ = ["Handle", "ProgressEngine", "drive"]

Result = TypeVar("Result")

_WAIT = "wait"


def drive(task: Task[Result], *, spin: bool) -> Result:
    """Run a task to its end in the calling thread."""
    backoff: Backoff | None = None
    try:
        while True:
            try:
                moved = next(task)
            except StopIteration as stop:
                return stop.value  # type: ignore[no-any-return]
            if moved:
                backoff = None
            else:
                backoff = backoff or Backoff(spin=spin)
                backoff.pause()
    except BaseException:
        # Interrupted between two steps, the task would live on in the traceback, and nobody would hear of it.
        task.close()
        raise


class Handle(Generic[Result]):
    """An operation in flight.

    Args:
        engine: Advances it.
        description: For messages.
        leave: Called by who has waited for it, each time.
    """

    def __init__(self, engine: ProgressEngine, description: str, leave: Callable[[], None] | None = None) -> None:
        self.description = description
        self._engine = engine
        self._leave = leave
        self._done = False
        self._result: Result | None = None
        self._error: BaseException | None = None

    @property
    def done(self) -> bool:
        """Whether the operation has ended, well or with an error; never blocks."""
        return self._done

    def wait(self, timeout_s: float | None = None) -> Result:
        """Wait for the end and return the operation's result.

        Args:
            timeout_s: Give up waiting (not the operation) after so many seconds.

        Raises:
            CommTimeoutError: `timeout_s` has passed; the operation is still in flight.
            MpitrainError: What the operation failed with; again at every further call.
        """
        if not self._done:
            self._engine.wait(self, timeout_s)
        if self._error is not None:
            raise self._error
        if self._leave is not None:
            self._leave()
        return self._result  # type: ignore[return-value]

    def resolve(self, result: Result) -> None:
        """Say that the operation has ended well; for whoever runs it."""
        self._result = result
        self._done = True

    def reject(self, error: BaseException) -> None:
        """Say that the operation has failed; for whoever runs it."""
        self._error = error
        self._done = True


class _Running:
    """A task and the handle that speaks for it."""

    __slots__ = ("handle", "task")

    def __init__(self, handle: Handle[Any], task: Task[Any]) -> None:
        self.handle = handle
        self.task = task

    def advance(self) -> bool:
        try:
            return next(self.task)
        except StopIteration as stop:
            self.handle.resolve(stop.value)
        except BaseException as error:
            self.handle.reject(error)
            if not isinstance(error, Exception):  # an interrupt is for whoever drives, not only for this operation
                raise
        return True


class ProgressEngine:
    """Advances the operations of any number of communicators.

    Args:
        spin_waiting: Whether a thread that waits for a handle may keep polling.
        spin_background: Whether the progress thread may keep polling.
    """

    def __init__(self, *, spin_waiting: bool = False, spin_background: bool = False) -> None:
        self.spin_waiting = spin_waiting
        self.spin_background = spin_background
        self._thread = ProgressThread(self)
        # Guards what tells the thread whether there is work, and the clock.
        self._changed = self._thread.changed
        self._clock = CommunicationClock()
        self._calls: list[Calls] = []
        self._active: list[_Running] = []
        self._driving = threading.Lock()
        self._waiters = 0
        self.recorder: Recorder | None = None

    @classmethod
    def for_node(cls, settings: Settings, topology: Topology) -> ProgressEngine:
        """Return an engine that polls where the node has the cores for it, unless the settings say something else."""
        # The thread that waits needs the rank's own core; a progress thread that polls needs a second one.
        by_itself = settings.wait == "auto"
        return cls(
            spin_waiting=topology.cores_per_rank >= 1 if by_itself else settings.wait == "spin",
            spin_background=topology.cores_per_rank >= 2 if by_itself else settings.wait == "spin",
        )

    def start(
        self, task: Task[Result], description: str = "", leave: Callable[[], None] | None = None
    ) -> Handle[Result]:
        """Start a task: its first step runs here and now, the others as messages arrive. `leave` is the handle's."""
        handle: Handle[Result] = Handle(self, description, leave)
        running = _Running(handle, task)
        with self._as_caller():
            # In the caller's thread, so that the first messages leave at once.
            self._advance(running)
            if not handle.done:
                self._add(running)
        return handle

    def drive(self, task: Task[Result]) -> Result:
        """Run a task to its end in the calling thread."""
        began_ns = time.monotonic_ns()
        try:
            return drive(task, spin=self.spin_waiting)
        finally:
            self.book_blocking(began_ns)

    def book_blocking(self, began_ns: int) -> None:
        """Count the time since then, by the monotonic clock, as one in which the caller was held up."""
        ended_ns = time.monotonic_ns()
        # No lock: this is the path of calls that take microseconds.
        self._clock.book_blocking((ended_ns - began_ns) * 1e-9)
        if self.recorder is not None:
            self.recorder.add(_WAIT, began_ns, ended_ns)

    @contextlib.contextmanager
    def _as_caller(self) -> Iterator[None]:
        """Count the time as the caller's, unless the progress thread itself calls."""
        if self._thread.is_current:
            yield
            return
        with self._changed:
            self._clock.note(callers=1)
        try:
            yield
        finally:
            with self._changed:
                self._clock.note(callers=-1)

    def count(self, calls: Calls) -> None:
        """Have the calls of one more communicator in the counters."""
        with self._changed:
            self._calls.append(calls)

    @property
    def counters(self) -> CommunicationCounters:
        """What this process has communicated so far, on all communicators of this engine."""
        with self._changed:
            self._clock.note()
            operations = sum(calls.number for calls in self._calls)
            nbytes = sum(calls.nbytes for calls in self._calls)
            return CommunicationCounters(operations, nbytes, self._clock.exposed_s, self._clock.hidden_s)

    def promise(self, description: str = "") -> Handle[Any]:
        """Return the handle of an operation that some other task will resolve."""
        return Handle(self, description)

    def _add(self, running: _Running) -> None:
        with self._changed:
            if self._thread.is_closed:
                raise RuntimeError("progress engine: cannot start an operation, it is closed")
            self._active.append(running)
            self._clock.note(is_in_flight=True)
            self._thread.wake()

    def serve_regularly(self, service: Callable[[], object]) -> None:
        """Have the progress thread call it a few times per second, whatever the caller does; see `Services`."""
        self._thread.serve_regularly(service)

    def install(self, recorder: Recorder | None) -> bool:
        """Record what is done from now on, or no longer; whether the recorder was taken, as there is only one."""
        if recorder is not None and self.recorder is not None:
            return False
        self.recorder = recorder
        return True

    def wait(self, handle: Handle[Result], timeout_s: float | None = None) -> None:
        """Advance everything in flight until `handle` is done."""
        self.wait_until(lambda: handle.done, handle.description, timeout_s)

    def wait_until(self, is_over: Callable[[], object], description: str, timeout_s: float | None = None) -> None:
        """Advance everything in flight until `is_over()` is true.

        Raises:
            CommTimeoutError: `timeout_s` has passed.
        """
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        backoff = Backoff(spin=self.spin_waiting)
        recorder, began_ns = self.recorder, time.monotonic_ns()
        with self._changed:
            self._waiters += 1
            self._clock.note(callers=1)
        try:
            while not is_over():
                if self.advance_all():
                    backoff.reset()
                    continue
                if deadline_s is not None and time.monotonic() > deadline_s:
                    raise CommTimeoutError(f"{description}: not done after {timeout_s:g} s; still in flight")
                backoff.pause()
        finally:
            with self._changed:
                self._waiters -= 1
                self._clock.note(callers=-1)
                self._changed.notify_all()
            if recorder is not None:
                recorder.add(_WAIT, began_ns, time.monotonic_ns(), description)

    def advance_all(self) -> bool:
        """Move on all operations in flight, in turn; whether any of them moved."""
        with self._driving:
            moved = False
            finished = False
            for running in tuple(self._active):
                # Done already: an interrupt ended it, and the round in which it would have been dropped.
                moved |= running.handle.done or self._advance(running)
                finished |= running.handle.done
            if finished:
                with self._changed:
                    self._active = [running for running in self._active if not running.handle.done]
                    self._clock.note(is_in_flight=bool(self._active))
            return moved

    def _advance(self, running: _Running) -> bool:
        recorder = self.recorder
        if recorder is None:
            return running.advance()
        began_ns = time.monotonic_ns()
        moved = running.advance()
        if moved:
            name, _, details = running.handle.description.partition(" ")
            recorder.add_step(name, began_ns, details)
        return moved

    def close(self) -> None:
        """Stop the thread; operations still in flight stay unfinished."""
        self._thread.close()

    def abandon(self) -> None:
        """Give up what is in flight, at the end of the process: its memory must outlive the interpreter."""
        self.close()
        for running in self._active:
            running.task.close()

    @property
    def is_idle(self) -> bool:
        """Whether nothing is in flight."""
        return not self._active

    def has_background_work(self) -> bool:
        """Whether operations are in flight that no waiting thread advances."""
        return bool(self._active) and not self._waiters
