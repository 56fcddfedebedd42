"""Named operations: matched by name, in whatever order ranks start them.

Each rank announces the operations that it is ready for to rank 0, which decides what all run next. Announcements
leave at once, in the thread that starts an operation; all else is done by one task that the progress engine advances
for as long as an operation of this rank is undecided. A rank with none sends and receives nothing.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from mpitrain.collectives import Communicator, Handle, Task
from mpitrain.errors import CommError
from mpitrain.memory import flat_view
from mpitrain.negotiation.announcement import Announcement, Decision, tensors_of
from mpitrain.negotiation.device_arrays import start_staged
from mpitrain.negotiation.dialogue import Dialogue
from mpitrain.negotiation.execution import Entry, Results, contiguous, neutral_entries, run_decision
from mpitrain.negotiation.failures import as_collective_error, error_of, error_of_closing
from mpitrain.negotiation.in_flight import InFlight, Reservation, StandIn
from mpitrain.negotiation.joining import JOIN, STEP, STEP_END, Steps, UnnamedOperations

__all__ = ["Negotiator"]


class Negotiator:
    """Runs the named operations of one group of ranks.

    Args:
        comm: The group. Its collectives and its messages are duplicated, so every rank must call.

    Attributes:
        group: The communicator that was given. Its operations are never used here: they belong to the threads that
            set something up for the group, in the order of their calls.
        comm: The duplicate that the named operations run on, in the order of decisions.
        settings: Of the group.
        steps: Operations of the group that are not negotiated unless ranks have joined.
    """

    def __init__(self, comm: Communicator) -> None:
        self.group = comm
        self.comm = comm.duplicate(comm.settings.replace(check=False))
        self.settings = comm.settings
        control = comm.transport.duplicate()
        comm.free_with(self, control.free)
        self._dialogue = Dialogue(control, comm.settings)
        self._in_flight = InFlight(self._dialogue.announce)
        self._unnamed = UnnamedOperations()
        # Whoever starts an operation sees to it that somebody serves it.
        self._lock = threading.Lock()
        self._is_serving = False
        self.steps = Steps(_held_weakly(self._start_step), _held_weakly(self._end_step))
        comm.before_leaving(self.leave)
        # A rank that waits for something else, or for nothing, learns of those that have joined; rank 0 also of those
        # that wait for a named operation which it has not started.
        comm.while_waiting(self.attend)
        if comm.size > 1 and self._dialogue.decides:
            comm.engine.serve_regularly(self.attend)

    def start(
        self,
        name: str,
        collective: str,
        arrays: Sequence[Any] = (),
        *,
        op: str = "",
        root: int = -1,
        prescale: float = 1.0,
        postscale: float = 1.0,
        splits: Sequence[int] = (),
        in_place: bool = False,
    ) -> Handle[Results]:
        """Announce an operation.

        Args:
            name: Equal on all ranks that mean the same operation.
            collective: See `Announcement`; likewise the other arguments.
            arrays: One, or all of a grouped operation. Copied if they are not contiguous and not `in_place`.
            op: See `Announcement`.
            root: See `Announcement`.
            prescale: See `Announcement`.
            postscale: See `Announcement`.
            splits: See `Announcement`.
            in_place: Results replace the inputs (all-reduce, broadcast), which must be contiguous.

        Returns:
            Handle of a list with one result per array; for an all-gather and an all-to-all of pairs with the rows
            that came from each rank.

        Raises:
            ValueError: An operation of this name is in flight here, or this rank has joined.
            ValueError, TypeError: An array that cannot be communicated.
        """
        if not in_place:
            arrays = [contiguous(array) for array in arrays]
        views = [flat_view(array, name=name, writable=in_place) for array in arrays]
        tensors = tensors_of(collective, views)
        announcement = Announcement(name, collective, tensors, op, root, prescale, postscale, tuple(splits))
        enter = functools.partial(self._enter, announcement, in_place=in_place)
        if all(view.is_host for view in views):
            return enter(list(arrays))
        # Nobody else may start it while what it brings is on its way.
        reservation = self._in_flight.reserve(name)

        def refuse(problem: str) -> None:
            self._in_flight.release(reservation)
            self.refuse(name, collective, problem)

        enter = functools.partial(enter, reservation=reservation)
        try:
            return start_staged(self.comm, f"{collective} {name}", views, enter, refuse, in_place=in_place)
        except BaseException:
            self._in_flight.release(reservation)
            raise

    def await_name(self, name: str) -> None:
        """Return when no operation of this name is in flight here."""
        if self._in_flight.holds(name):
            self.comm.engine.wait_until(lambda: not self._in_flight.holds(name), name)

    def refuse(self, name: str, collective: str, problem: str) -> None:
        """Say that this rank cannot take part in an operation that others may start; they get an error.

        Nothing is said if an operation of this name is in flight here.
        """
        if self.comm.size > 1:
            # What it raises instead matters more than that the others cannot be told.
            with contextlib.suppress(ValueError, CommError):
                self._enter(Announcement(name, collective, problem=problem), [], in_place=False)

    def join(self, stand_in: StandIn) -> Handle[Results]:
        """Say that this rank has run out of data: until all ranks have joined it takes part with what changes nothing.

        Meanwhile it can start no operation.

        Args:
            stand_in: Called, by whichever thread, with what this rank has to call, soon and in order, to take part in
                the steps of the others.

        Returns:
            Handle of a list with the rank that has joined last.
        """
        # What this rank has started before is announced before.
        self.comm.engine.wait_until(lambda: not self._in_flight.has_reservations, JOIN)
        self._in_flight.join(stand_in)
        return self._enter(Announcement(JOIN, JOIN), [], in_place=False)

    def _start_step(self, name: str) -> None:
        self._enter(Announcement(name, STEP), [], in_place=False)

    def _end_step(self, name: str) -> None:
        entry = self._in_flight.take_back(name)
        if entry is not None:
            self._forget([entry])
            with contextlib.suppress(CommError):
                self._dialogue.announce(Announcement(name, STEP_END))

    def _enter(
        self,
        announcement: Announcement,
        arrays: list[Any],
        *,
        in_place: bool,
        reservation: Reservation | None = None,
    ) -> Handle[Results]:
        name = announcement.name
        handle = self.comm.engine.promise(f"{announcement.collective} {name}")
        entry = Entry(announcement, arrays, in_place, handle, time.monotonic())
        if closing := self._in_flight.enter(entry, self.comm.engine.recorder, reservation):
            handle.reject(error_of_closing(name, closing))
        else:
            self._be_served()
        return handle

    def next_name(self) -> str:
        """Return a name for an operation that the caller has not named; see `UnnamedOperations`."""
        return self._unnamed.next_name()

    def attend(self) -> None:
        """Look for what other ranks have said, though this one may have started nothing."""
        if self._in_flight.closing is None:
            self._be_served()

    def leave(self, reason: str) -> None:
        """End here: this rank takes part in no further operation. The others are told, so that none waits in vain."""
        if self._close(Decision((), reason="left", closed=f"this rank {reason}")):
            # Whoever cannot be told learns it from the transport.
            with contextlib.suppress(CommError):
                self._dialogue.tell_of_leaving(reason)
        self.comm.leave(reason)

    def free(self) -> None:
        """Release the communicators. Every rank must call, when no operation is in flight."""
        self._dialogue.free()
        self.comm.free()

    # What the engine advances

    def _be_served(self) -> None:
        with self._lock:
            if self._is_serving:
                return
            self._is_serving = True
        self.comm.engine.start(self._serve(), "negotiation")

    def _serve(self) -> Task[None]:
        try:
            while True:
                moved, decisions = self._dialogue.hear(self._in_flight.waiting)
                self._carry_out(decisions)
                with self._lock:
                    # What is entered from now on is served anew.
                    is_waiting = self._in_flight.awaits_decision
                    if not is_waiting and not moved:
                        self._is_serving = False
                        return
                if is_waiting:
                    yield moved
        except (Exception, KeyboardInterrupt) as error:
            # Nobody else would decide: without this, whoever waits here or elsewhere would wait for ever.
            reason = f"has failed with {type(error).__name__}: {error}"
            self._close(Decision((), reason="broken", closed=f"this rank {reason}"))
            with contextlib.suppress(CommError):
                self._dialogue.tell_of_leaving(reason)
            raise

    def _give_up(self, closing: Decision) -> None:
        self._close(closing)
        if closing.reason == "stalled":
            # Whoever is missing may wait for the optimizer steps of the others: they end as well.
            self.group.leave(f"has given up: {closing.closed}")

    def _carry_out(self, decisions: list[Decision]) -> None:
        recorder = self.comm.engine.recorder
        if decisions and self._dialogue.decides and recorder is not None:
            recorder.mark_cycle([name for decision in decisions for name in decision.names])
        for decision in decisions:
            if decision.closed:
                self._give_up(decision)
                continue
            if not decision.names:
                self.steps.note_absent(decision.absent)
                continue
            entries = self._entries_of(decision)
            if not entries:
                continue  # an error of what this rank never started, or has given up
            for entry in entries:
                entry.enter("in flight")
            if decision.error:
                self._fail(entries, error_of(decision))
                continue
            collective = entries[0].announcement.collective
            if collective == JOIN:
                self._end_join()
            if collective in (JOIN, STEP):
                self._forget(entries)
                entries[0].handle.resolve([decision.last])
                continue
            try:
                task = run_decision(self.comm, decision, entries)
            except (ValueError, TypeError) as error:
                # It has no meaning on any rank: all fail alike, and nothing was started.
                self._fail(entries, error)
                continue
            except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001  (the handles have it)
                # The others may have started what this rank could not: their collectives match no longer.
                self.comm.revoke(f"{decision.names[0]}: {type(error).__name__}: {error}")
                self._fail(entries, as_collective_error(error))
                continue
            self.comm.engine.start(self._finish(task, entries), ", ".join(decision.names))

    def _entries_of(self, decision: Decision) -> list[Entry]:
        """Take the operations of a decision out of those that wait for one."""
        entries, stand_in = self._in_flight.take(decision.names)
        if entries or stand_in is None or self.comm.rank not in decision.absent:
            return entries
        first = decision.announced[0]
        if first.collective == STEP:
            stand_in(self.steps.stand_in_of(first.name))
            return []
        return neutral_entries(decision, self.comm.engine)

    def _end_join(self) -> None:
        self.steps.note_absent(())
        self._unnamed.begin_anew()
        self._in_flight.end_join()

    def _finish(self, task: Task[list[Results]], entries: list[Entry]) -> Task[None]:
        try:
            results = yield from task
        except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001  (the handles have it)
            self._fail(entries, as_collective_error(error))
            return
        self._forget(entries)
        for entry, result in zip(entries, results, strict=True):
            entry.handle.resolve(result)

    def _fail(self, entries: Sequence[Entry], error: BaseException) -> None:
        self._forget(entries)
        for entry in entries:
            entry.handle.reject(error)

    def _forget(self, entries: Sequence[Entry]) -> None:
        """Free the names; before the handles are done, so that whoever waits for one may use its name again."""
        self._in_flight.forget(entries)
        for entry in entries:
            entry.enter("")

    def _close(self, closing: Decision) -> bool:
        """End what is undecided, and all that will be started; whether that was not done before."""
        is_first, entries = self._in_flight.close(closing)
        for entry in entries:
            self._fail([entry], error_of_closing(entry.announcement.name, closing))
        return is_first


def _held_weakly(method: Callable[[str], None]) -> Callable[[str], None]:
    """Return what calls a method of an object that lives; in a cycle, its communicators would be freed late."""
    reference = weakref.WeakMethod(method)

    def call(name: str) -> None:
        if (function := reference()) is not None:
            function(name)

    return call
