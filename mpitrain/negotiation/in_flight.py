"""The named operations of one rank that are not done: which names they hold, and which of them wait for a decision.

Shared by the threads that start operations and the one that carries out what is decided.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TypeAlias

from mpitrain.collectives.optional_meeting import OptionalMeeting
from mpitrain.negotiation.announcement import Announcement, Decision
from mpitrain.negotiation.execution import Entry
from mpitrain.negotiation.failures import error_of_name
from mpitrain.negotiation.joining import JOIN
from mpitrain.negotiation.refusals import Refusals
from mpitrain.negotiation.stalls import Waiting
from mpitrain.observe import Recorder

__all__ = ["InFlight", "Reservation", "StandIn"]

StandIn: TypeAlias = Callable[[Callable[[], None]], None]
"""Called, by whichever thread, with what a rank that has joined has to call, soon and in order, for steps of others."""


class Reservation:
    """Holds the name of an operation that is not announced yet, as what it brings is still on its way.

    Args:
        name: Of the operation.
    """

    def __init__(self, name: str) -> None:
        self.name = name


class InFlight:
    """Entries by name.

    Args:
        announce: Tells rank 0 of one, as soon as its name is free.
        meeting: Where small ones meet that are not announced. What is announced declines it, and what is decided begins
            an era.
    """

    def __init__(self, announce: Callable[[Announcement], None], meeting: OptionalMeeting | None = None) -> None:
        self._announce = announce
        self._meeting = meeting
        # Guards all of the next lines.
        self._lock = threading.Lock()
        # Who holds them: an entry, or a reservation.
        self._names: dict[str, Entry | Reservation] = {}
        self._undecided: dict[str, Entry] = {}
        self._refusals = Refusals()
        self._closing: Decision | None = None
        # For as long as this rank has joined.
        self._stand_in: StandIn | None = None

    @property
    def closing(self) -> Decision | None:
        """Why nothing will be decided any more; None as long as that may be."""
        return self._closing

    @property
    def awaits_decision(self) -> bool:
        """Whether anything is to be decided, or announced when something is."""
        with self._lock:
            return bool(self._undecided) or self._refusals.keep_waiting

    def holds(self, name: str) -> bool:
        """Whether an operation of this name is in flight."""
        return name in self._names

    def waiting(self) -> Waiting:
        """Return what waits for a decision, and since when."""
        with self._lock:
            undecided = [(name, entry.since_s) for name, entry in self._undecided.items() if name != JOIN]
            return Waiting(undecided, [(each.announcement.name, each.since_s) for each in self._refusals.waiting()])

    def reserve(self, name: str) -> Reservation:
        """Hold a name for an operation that `enter` takes on later, or `release` gives up.

        Raises:
            ValueError: It is in flight, or this rank has joined.
        """
        reservation = Reservation(name)
        with self._lock:
            self._check_free(name, None)
            self._names[name] = reservation
        return reservation

    def release(self, reservation: Reservation) -> None:
        """Give a name up, if it is still held by the reservation."""
        with self._lock:
            self._free(reservation.name, reservation)

    def enter(self, entry: Entry, recorder: Recorder | None, reservation: Reservation | None = None) -> Decision | None:
        """Take an operation on, and announce it; if none can be any more, return why.

        Args:
            entry: The operation.
            recorder: Of what becomes of it.
            reservation: Of its name, if there is one.

        Raises:
            ValueError: Its name is in flight, or this rank has joined.
            CommError: It cannot be announced.
        """
        name = entry.announcement.name
        with self._lock:
            if self._closing is not None:
                self._free(name, reservation)
                return self._closing
            if entry.announcement.collective != JOIN:
                self._check_free(name, reservation)
            entry.observe(recorder)
            if not self._refusals.put_behind(entry):
                self._submit(entry)
            if not entry.announcement.problem:
                self._names[name] = entry
        return None

    def _check_free(self, name: str, reservation: Reservation | None) -> None:
        if self._stand_in is not None:
            raise ValueError(f"{name}: cannot be started on a rank that has joined; wait until join has returned")
        if self._names.get(name) is not reservation:
            raise error_of_name(name)

    def _free(self, name: str, holder: Entry | Reservation | None) -> None:
        if holder is not None and self._names.get(name) is holder:
            del self._names[name]

    def _submit(self, entry: Entry) -> None:
        self._announce(entry.announcement)
        if self._meeting is not None:
            self._meeting.decline()
        if entry.announcement.problem:
            self._refusals.put(entry)
        else:
            self._undecided[entry.announcement.name] = entry

    def take(self, names: Iterable[str]) -> tuple[list[Entry], StandIn | None]:
        """Return the operations of a decision that this rank has started, and who stands in if it has joined.

        They wait for no decision any more. What was refused is not among them.
        """
        with self._lock:
            entries = [entry for name in names if (entry := self._take(name))]
            if self._meeting is not None:
                self._meeting.begin_era()
                self._decline_if_busy(self._meeting)
            return entries, self._stand_in

    def _decline_if_busy(self, meeting: OptionalMeeting) -> None:
        """Decline the next meeting if this rank has said that it takes another way, and is not through with it."""
        if self._undecided or self._refusals.are_any or self._stand_in is not None:
            meeting.decline()

    def _take(self, name: str) -> Entry | None:
        was_refused, following = self._refusals.decided(name)
        if following is not None:
            self._submit(following)
        return None if was_refused else self._undecided.pop(name, None)

    # Operations that are not announced

    def come(self, entry: Entry, digest: int, bring: Callable[[int], None]) -> bool:
        """Come to the next meeting, unless this rank has anything in flight or has declined; whether it has come.

        Args:
            entry: For what; it holds its name from now on.
            digest: Of what it means.
            bring: Leaves what it brings in a slot.
        """
        meeting = self._meeting
        if meeting is None:
            return False
        with self._lock:
            is_free = not (self._names or self._undecided or self._refusals.are_any)
            if not is_free or self._stand_in or self._closing or meeting.visitor or meeting.is_declined:
                return False
            bring(meeting.next_slot)
            self._names[entry.announcement.name] = entry
            meeting.come(digest, entry)
            return True

    def is_at_meeting(self, entry: Entry) -> bool:
        """Whether it is what this rank has come for, and has not left."""
        return self._meeting is not None and self._meeting.visitor is entry

    def end_meeting(self, entry: Entry) -> None:
        """Leave a meeting that has taken place, and free the name."""
        assert self._meeting is not None
        with self._lock:
            self._free(entry.announcement.name, entry)
            self._meeting.leave(took_place=True)
            self._decline_if_busy(self._meeting)

    def announce_instead(self, entry: Entry, *, took_place: bool) -> Decision | None:
        """Leave a meeting, and announce what this rank has come for; if nothing can be any more, return why.

        Args:
            entry: Goes on to hold its name.
            took_place: Whether all had come, though they meant different things.

        Raises:
            CommError: It cannot be announced.
        """
        assert self._meeting is not None
        with self._lock:
            self._meeting.leave(took_place=took_place)
            # To the others it begins now.
            entry.since_s = time.monotonic()
            if self._closing is None and not self._refusals.put_behind(entry):
                self._submit(entry)
            return self._closing

    # What is not in flight any more

    def take_back(self, name: str) -> Entry | None:
        """Return an operation if it is not decided yet; it waits for no decision any more."""
        with self._lock:
            return self._undecided.pop(name, None)

    def join(self, stand_in: StandIn) -> bool:
        """Note that this rank has joined: it starts nothing, and has somebody stand in.

        Not as long as an operation that it has started may still be announced; whether it was done.
        """
        with self._lock:
            is_at_meeting = self._meeting is not None and self._meeting.visitor is not None
            is_reserved = any(isinstance(holder, Reservation) for holder in self._names.values())
            # Once the group has ended nothing is announced any more, and who joins learns why.
            if self._closing is None and (is_at_meeting or is_reserved):
                return False
            self._stand_in = stand_in
            return True

    def end_join(self) -> None:
        """Note that all ranks have joined."""
        with self._lock:
            self._stand_in = None

    def forget(self, entries: Sequence[Entry]) -> None:
        """Free the names of what is done, or will never be."""
        with self._lock:
            for entry in entries:
                self._free(entry.announcement.name, entry)

    def close(self, closing: Decision) -> tuple[bool, list[Entry]]:
        """Let nothing be decided any more; whether that is new, and what was waiting."""
        with self._lock:
            is_first = self._closing is None
            self._closing = self._closing or closing
            entries = [*self._undecided.values(), *self._refusals.clear()]
            self._undecided.clear()
        return is_first, entries
