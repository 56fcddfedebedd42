"""Small named all-reduces that every rank of a node starts and waits for: nobody has to decide about them.

A rank that has nothing else in flight leaves such an array where the others see it, with a digest of what it means. If
all do, and mean the same, each reduces it on its own: one exchange of flags, and the operation is done. If another rank
does something else meanwhile, or means something else, the operation is announced like any other. The ranks never take
different ways: see `collectives.optional_meeting`.
"""

from __future__ import annotations

import functools
import math
import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpitrain.collectives import Communicator, Handle, ProgressEngine
from mpitrain.collectives.agreement import digest_of
from mpitrain.collectives.calls import Calls
from mpitrain.collectives.optional_meeting import OptionalMeeting
from mpitrain.collectives.reduction import Reduction
from mpitrain.collectives.small import MOST_READ_NBYTES, SmallAllreduce
from mpitrain.comm import Backoff
from mpitrain.memory import FlatArray, allocate_like, dtype_named, flat_view, is_on_device, parse_op
from mpitrain.negotiation.announcement import Announcement, Decision, tensors_of
from mpitrain.negotiation.execution import Entry, Results, contiguous
from mpitrain.negotiation.in_flight import InFlight
from mpitrain.negotiation.scaling import op_to_run, scale_input, scale_result

__all__ = ["Attempt", "Shortcut"]

# How long a rank waits for the others before it goes on like with any operation in flight.
_PATIENCE_S = 1e-3
# Slots begin on cache lines.
_LINE_NBYTES = 64


class Shortcut:
    """The one way of a group's operations that needs no announcement.

    Args:
        comm: Of the group.
        in_flight: What this rank has in flight.
        meeting: Of the group's ranks, with slots of `slot_nbytes`.
    """

    def __init__(self, comm: Communicator, in_flight: InFlight, meeting: OptionalMeeting) -> None:
        self.meeting = meeting
        self.in_flight = in_flight
        self.engine: ProgressEngine = comm.engine
        self.calls = Calls()
        comm.engine.count(self.calls)
        self._most_nbytes = self.most_nbytes(comm.size)
        self._kind_of = functools.lru_cache(maxsize=256)(functools.partial(_Kind, meeting, comm.size))

    @staticmethod
    def most_nbytes(size: int) -> int:
        """Return the size of the largest array among so many ranks."""
        return MOST_READ_NBYTES // max(1, size - 1)

    @classmethod
    def slot_nbytes(cls, size: int) -> int:
        """Return how much memory each meeting of so many ranks needs for each."""
        return -(-cls.most_nbytes(size) // _LINE_NBYTES) * _LINE_NBYTES

    def attempt(
        self, name: str, array: Any, *, op: str, prescale: float, postscale: float, in_place: bool
    ) -> Attempt | None:
        """Prepare an all-reduce of an array; None if it cannot go this way.

        Args:
            name: As of `Negotiator.start`; likewise the others.
            array: The one array of the operation.
            op: See `Announcement`.
            prescale: See `Announcement`.
            postscale: See `Announcement`.
            in_place: The result replaces the array, which must be contiguous.

        Raises:
            ValueError, TypeError: An array that cannot be communicated.
            MemoryError: There is none for the result.
        """
        if op == "adasum" or is_on_device(array) or getattr(array, "nbytes", 0) > self._most_nbytes:
            return None
        array = array if in_place else contiguous(array)
        view = flat_view(array, name=name, writable=in_place)
        if not 0 < view.nbytes <= self._most_nbytes:
            return None
        tensors = tensors_of("allreduce", [view])
        kind = self._kind_of(Announcement("", "allreduce", tensors, op, -1, prescale, postscale))
        if not kind.has_meaning:
            return None  # which is an error of all ranks, whichever way each of them would go
        # Whoever has no memory for it says so before others wait.
        result = array if in_place else allocate_like(array, array.shape)
        target = view.data if in_place else flat_view(result, writable=True).data
        handle: Handle[Results] = self.engine.promise(f"allreduce {name}")
        entry = Entry(kind.announcement._replace(name=name), [array], in_place, handle, time.monotonic())
        return Attempt(self, kind, entry, view, (result, target))


class Attempt:
    """One all-reduce of a rank.

    Attributes:
        entry: What it is if it goes on as an operation in flight.
    """

    __slots__ = ("_began_ns", "_kind", "_result", "_shortcut", "_target", "_view", "entry", "is_taken_on")

    def __init__(
        self, shortcut: Shortcut, kind: _Kind, entry: Entry, view: FlatArray, target: tuple[Any, NDArray[Any]]
    ) -> None:
        self._shortcut = shortcut
        self._kind = kind
        self.entry = entry
        self._view = view
        self._result, self._target = target
        self._began_ns = time.monotonic_ns()
        self.is_taken_on = False
        """Whether somebody sees to it that it comes to its end."""

    @property
    def name(self) -> str:
        """Name of the operation."""
        return self.entry.announcement.name

    def come(self) -> bool:
        """Come to the next meeting, if this rank can; whether it has."""
        digest = digest_of(f"{self.name} {self._kind.meaning}")
        return self._shortcut.in_flight.come(self.entry, digest, self._bring)

    def _bring(self, slot: int) -> None:
        self._kind.bring(slot, self._view.data)

    @property
    def is_at_meeting(self) -> bool:
        """Whether this rank has come, and has not left."""
        return self._shortcut.in_flight.is_at_meeting(self.entry)

    def is_met_soon(self) -> bool:
        """Whether all come within a moment, and mean the same."""
        meeting = self._shortcut.meeting
        if not meeting.is_complete():
            backoff = Backoff(spin=self._shortcut.engine.spin_waiting)
            deadline_s = time.monotonic() + _PATIENCE_S
            while not meeting.is_complete():
                if meeting.find_absent() is not None or time.monotonic() > deadline_s:
                    return False
                backoff.pause()
        return meeting.agrees()

    def take(self) -> Results:
        """Reduce what all have brought, and leave the meeting."""
        shortcut = self._shortcut
        try:
            self._kind.take(shortcut.meeting.slot, self._target)
        finally:
            shortcut.in_flight.end_meeting(self.entry)
        shortcut.calls.number += 1
        shortcut.calls.nbytes += self._view.nbytes
        # One that has come late is recorded as what it has become.
        if (recorder := shortcut.engine.recorder) is not None and not self.is_taken_on:
            recorder.operation(f"{self.name} named allreduce by shortcut", self._began_ns).end()
        return [self._result]

    def note_wait(self) -> None:
        """Count the time up to now as one in which the caller was held up."""
        self._shortcut.engine.book_blocking(self._began_ns)

    def takes_place(self) -> bool | None:
        """Whether all have come, and mean the same, or ever will; None while that is open."""
        meeting = self._shortcut.meeting
        if meeting.is_complete():
            return meeting.agrees()
        return None if meeting.find_absent() is None else False

    @property
    def missing(self) -> list[int]:
        """Ranks that have not come yet."""
        return self._shortcut.meeting.missing()

    def announce_instead(self) -> Decision | None:
        """Announce it, as it does not take place here; if nothing can be announced any more, return why.

        Raises:
            CommError: It cannot be announced.
        """
        # If all have come after all, they see that they mean different things.
        return self._shortcut.in_flight.announce_instead(self.entry, took_place=self._shortcut.meeting.is_complete())


class _Kind:
    """All-reduces that differ by name only.

    Args:
        meeting: Arrays are brought there.
        size: Number of ranks.
        announcement: Of one of them, without its name.

    Attributes:
        announcement: The same.
        meaning: Differs from that of any other kind.
        has_meaning: Whether it can be done at all.
    """

    def __init__(self, meeting: OptionalMeeting, size: int, announcement: Announcement) -> None:
        self.announcement = announcement
        self.meaning = repr(announcement)
        self._size = size
        ((dtype, shape),) = announcement.tensors
        self._dtype = dtype_named(dtype)
        self.has_meaning = self._can_scale()
        count = math.prod(shape)
        small = SmallAllreduce(meeting, Reduction(self._dtype, parse_op(op_to_run(announcement.op)), size), count)
        self._own = small.own((count,))
        self._reduce = small.reducers((count,))

    def _can_scale(self) -> bool:
        probe = np.ones(1, self._dtype.storage)
        try:
            scale_input(probe, self._dtype, self.announcement.prescale)
            self._scale_result(probe)
        except (ValueError, TypeError):
            return False
        return True

    def bring(self, slot: int, data: NDArray[Any]) -> None:
        """Leave an array in a slot."""
        own = self._own[slot]
        own[...] = data
        scale_input(own, self._dtype, self.announcement.prescale)

    def take(self, slot: int, target: NDArray[Any]) -> None:
        """Reduce what all have left in a slot into `target`."""
        self._reduce[slot](target)
        self._scale_result(target)

    def _scale_result(self, data: NDArray[Any]) -> None:
        scale_result(data, self._dtype, self.announcement.op, self.announcement.postscale, self._size)
