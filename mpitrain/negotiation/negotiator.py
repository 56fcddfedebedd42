"""Named operations: matched by name, in whatever order ranks start them.

Each rank announces the operations that it is ready for to rank 0, which decides what all run next. Announcements
leave at once, in the thread that starts an operation; all else is done by one task that the progress engine advances
for as long as an operation of this rank is undecided. A rank with none sends and receives nothing.
"""

from __future__ import annotations

import contextlib
import functools
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from mpitrain.collectives import Communicator, Handle
from mpitrain.errors import CommError
from mpitrain.memory import flat_view
from mpitrain.negotiation.announcement import Announcement, Decision, tensors_of
from mpitrain.negotiation.device_arrays import start_staged
from mpitrain.negotiation.dialogue import Dialogue
from mpitrain.negotiation.execution import Entry, Results, contiguous
from mpitrain.negotiation.failures import error_of_closing
from mpitrain.negotiation.in_flight import InFlight, Reservation, StandIn
from mpitrain.negotiation.joining import JOIN, STEP, STEP_END, Steps, UnnamedOperations
from mpitrain.negotiation.service import Service
from mpitrain.negotiation.shortcut import Shortcut

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
        meeting = self.comm.make_optional_meeting(Shortcut.slot_nbytes(comm.size))
        self._in_flight = InFlight(self._dialogue.announce, meeting)
        self._shortcut = None if meeting is None else Shortcut(self.comm, self._in_flight, meeting)
        self._unnamed = UnnamedOperations()
        self.steps = Steps(_held_weakly(self._start_step), _held_weakly(self._end_step))
        self._service = Service(
            self._dialogue, self._in_flight, group=comm, comm=self.comm, steps=self.steps, unnamed=self._unnamed
        )
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

    def reduce(
        self,
        name: str,
        array: Any,
        *,
        op: str,
        prescale: float = 1.0,
        postscale: float = 1.0,
        in_place: bool = False,
        on_start: Callable[[], None],
    ) -> Results | Handle[Results] | None:
        """All-reduce an array without an announcement, if that can be; see `shortcut`.

        Args:
            name: See `start`; likewise the others.
            array: The only one of the operation.
            op: See `Announcement`.
            prescale: See `Announcement`.
            postscale: See `Announcement`.
            in_place: See `start`.
            on_start: Called before an error is raised in spite of which the others count on this rank.

        Returns:
            A list with the result; a handle of that if others do not come at once; None if the operation has to be
            started.

        Raises:
            ValueError, TypeError: An array that cannot be communicated.
        """
        # Of a group that was given up no operation ends well, whichever way it would go.
        if self._shortcut is None or self.comm.is_revoked:
            return None
        attempt = self._shortcut.attempt(name, array, op=op, prescale=prescale, postscale=postscale, in_place=in_place)
        if attempt is None:
            return None
        has_taken = False
        try:
            if not attempt.come():
                return None
            if attempt.is_met_soon():
                has_taken = True
                results = attempt.take()
                attempt.note_wait()
                return results
            attempt.note_wait()
            return self._service.complete(attempt)
        except BaseException:
            if attempt.is_at_meeting:
                # Interrupted, while others may be about to take what this rank has brought.
                on_start()
                self._service.complete(attempt)
            elif has_taken or attempt.is_taken_on:
                on_start()
            else:
                self._service.forget([attempt.entry])
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
        # What this rank has started before is announced before, or needs no announcement.
        self.comm.engine.wait_until(lambda: self._in_flight.join(stand_in), JOIN)
        return self._enter(Announcement(JOIN, JOIN), [], in_place=False)

    def _start_step(self, name: str) -> None:
        self._enter(Announcement(name, STEP), [], in_place=False)

    def _end_step(self, name: str) -> None:
        entry = self._in_flight.take_back(name)
        if entry is not None:
            self._service.forget([entry])
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
            self._service.begin()
        return handle

    def next_name(self) -> str:
        """Return a name for an operation that the caller has not named; see `UnnamedOperations`."""
        return self._unnamed.next_name()

    def attend(self) -> None:
        """Look for what other ranks have said, though this one may have started nothing."""
        self._service.attend()

    def leave(self, reason: str) -> None:
        """End here: this rank takes part in no further operation. The others are told, so that none waits in vain."""
        if self._service.close(Decision((), reason="left", closed=f"this rank {reason}")):
            # Whoever cannot be told learns it from the transport.
            with contextlib.suppress(CommError):
                self._dialogue.tell_of_leaving(reason)
        self.comm.leave(reason)

    def free(self) -> None:
        """Release the communicators. Every rank must call, when no operation is in flight."""
        self._dialogue.free()
        self.comm.free()


def _held_weakly(method: Callable[[str], None]) -> Callable[[str], None]:
    """Return what calls a method of an object that lives; in a cycle, its communicators would be freed late."""
    reference = weakref.WeakMethod(method)

    def call(name: str) -> None:
        if (function := reference()) is not None:
            function(name)

    return call
