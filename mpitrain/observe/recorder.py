"""Records what a process does and when, into bounded memory.

A *lane* is a line of the picture: one for each thread, and further ones for operations in flight, which take the first
that is free. What lies in one lane never overlaps but is nested.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import threading
import time
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from typing import NamedTuple, TypeVar

__all__ = ["TRANSFER", "WAIT_FOR_PEERS", "Event", "OperationTrace", "Recorder"]

Result = TypeVar("Result")

WAIT_FOR_PEERS = "wait for peers"
TRANSFER = "transfer"

# Lanes of threads come first.
_FIRST_OPERATION_LANE = 100
# Shorter phases and steps cannot be seen, and there are very many.
_SHORTEST_NS = 2000
_UNFINISHED = "unfinished"


class Event(NamedTuple):
    """Something that took some time.

    Attributes:
        lane: See the module.
        name: Short, such as "reduce".
        details: More about it, may be empty.
        begin_ns: By this process's monotonic clock; likewise the next.
        end_ns: The same as the beginning for a mark.
    """

    lane: int
    name: str
    details: str
    begin_ns: int
    end_ns: int


class Recorder:
    """Events of one process; the latest, if there are more than fit.

    Args:
        capacity: How many events are kept.
        mark_cycles: Whether rounds of negotiation are marked.
    """

    def __init__(self, capacity: int, *, mark_cycles: bool = False) -> None:
        self.mark_cycles = mark_cycles
        self._events: deque[Event] = deque(maxlen=capacity)
        # Counts without a lock, from whatever thread.
        self._recorded = itertools.count()
        self._lock = threading.Lock()
        self._lane_of_thread: dict[int, int] = {}
        self.lane_names: dict[int, str] = {}
        self._free_lanes: list[int] = []
        self._operations: set[OperationTrace] = set()

    def add(self, name: str, begin_ns: int, end_ns: int, details: str = "", lane: int | None = None) -> None:
        """Record something that has ended; in the lane of the calling thread unless another is given."""
        next(self._recorded)
        self._events.append(Event(self.thread_lane() if lane is None else lane, name, details, begin_ns, end_ns))

    def add_step(self, name: str, begin_ns: int, details: str = "") -> None:
        """Record what the calling thread has done since `begin_ns`, if it took long enough to be seen."""
        end_ns = time.monotonic_ns()
        if end_ns - begin_ns >= _SHORTEST_NS:
            self.add(name, begin_ns, end_ns, details)

    def mark(self, name: str, details: str = "") -> None:
        """Record a moment, in the lane of the calling thread."""
        now_ns = time.monotonic_ns()
        self.add(name, now_ns, now_ns, details)

    def mark_cycle(self, names: Sequence[str]) -> None:
        """Mark that these named operations were decided, if that was asked for."""
        if self.mark_cycles:
            self.mark("cycle", ", ".join(names))

    @contextlib.contextmanager
    def span(self, name: str, details: str = "") -> Iterator[None]:
        """Record the time that the body takes."""
        begin_ns = time.monotonic_ns()
        try:
            yield
        finally:
            self.add(name, begin_ns, time.monotonic_ns(), details)

    def operation(self, description: str, begin_ns: int | None = None) -> OperationTrace:
        """Begin to record an operation in flight; its first word becomes its name."""
        with self._lock:
            if self._free_lanes:
                lane = heapq.heappop(self._free_lanes)
            else:
                lane = _FIRST_OPERATION_LANE + sum(number >= _FIRST_OPERATION_LANE for number in self.lane_names)
                self.lane_names[lane] = f"in flight {lane - _FIRST_OPERATION_LANE + 1}"
            trace = OperationTrace(self, lane, description, begin_ns)
            self._operations.add(trace)
        return trace

    def release(self, trace: OperationTrace) -> None:
        """Give the lane of an operation that has ended to another one."""
        with self._lock:
            self._operations.discard(trace)
            heapq.heappush(self._free_lanes, trace.lane)

    def thread_lane(self) -> int:
        """Return the lane of the calling thread."""
        identity = threading.get_ident()
        lane = self._lane_of_thread.get(identity)
        if lane is None:
            with self._lock:
                lane = self._lane_of_thread[identity] = len(self._lane_of_thread)
                thread = threading.current_thread()
                self.lane_names[lane] = "main" if thread is threading.main_thread() else thread.name
        return lane

    def take(self) -> tuple[list[Event], int]:
        """Return the events, with operations that are still in flight, and how many were dropped."""
        with self._lock:
            unfinished = list(self._operations)
        for trace in unfinished:
            trace.end(_UNFINISHED)
        events = list(self._events)
        return events, next(self._recorded) - len(events)


class OperationTrace:
    """Records one operation in flight and its phases, of which there is one at a time.

    Attributes:
        lane: Where it is drawn.
    """

    def __init__(self, recorder: Recorder, lane: int, description: str, begin_ns: int | None) -> None:
        self._recorder = recorder
        self.lane = lane
        self._description = description
        self._begin_ns = begin_ns or time.monotonic_ns()
        self._phase = ""
        self._since_ns = self._begin_ns
        self._is_held = False
        self._has_moved = False
        self._is_ended = False

    def enter(self, phase: str) -> None:
        """End the current phase and begin another one; "" is none."""
        if phase != self._phase and not self._is_held:
            now_ns = time.monotonic_ns()
            self._close_phase(now_ns)
            self._phase = phase
            self._since_ns = now_ns

    def hold(self, phase: str, task: Generator[bool, None, Result]) -> Generator[bool, None, Result]:
        """Run a task as one phase, whatever its parts enter meanwhile."""
        self.enter(phase)
        was_held, self._is_held = self._is_held, True
        try:
            return (yield from task)
        finally:
            self._is_held = was_held
            self._has_moved = False
            self.enter("")

    def note_message(self) -> None:
        """A message has come or gone, so that from now on waiting is for the network."""
        self._has_moved = True

    def watch(self, task: Generator[bool, None, Result]) -> Generator[bool, None, Result]:
        """Run a task, and call what it does while it cannot move waiting."""
        while True:
            try:
                moved = next(task)
            except StopIteration as stop:
                return stop.value  # type: ignore[no-any-return]
            except BaseException:
                task.close()
                raise
            if not moved:
                self.enter(TRANSFER if self._has_moved else WAIT_FOR_PEERS)
            try:
                yield moved
            except BaseException:
                task.close()
                raise

    def end(self, how: str = "") -> None:
        """Record the operation, which has ended; `how` if not well."""
        if self._is_ended:
            return
        self._is_ended = True
        now_ns = time.monotonic_ns()
        self._close_phase(now_ns)
        name, _, details = self._description.partition(" ")
        details = f"{details} ({how})" if how else details
        self._recorder.add(name, self._begin_ns, now_ns, details, self.lane)
        self._recorder.release(self)

    def _close_phase(self, now_ns: int) -> None:
        if self._phase and now_ns - self._since_ns >= _SHORTEST_NS:
            self._recorder.add(self._phase, self._since_ns, now_ns, "", self.lane)
