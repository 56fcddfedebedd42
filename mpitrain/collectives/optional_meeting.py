"""Meetings of a node's ranks that take place only if every rank comes to them.

Whoever comes waits for the others. A rank that goes another way *declines*: it will not come, so who waits for it sees
that the meeting cannot take place, and goes that way as well. What the other way leads to begins a new *era* on every
rank, whose meetings nobody has declined.

Why no two ranks take different ways: a meeting takes place if all have come to it. A rank goes away again only when it
knows of another that has not come and never will, so it has not taken place for anybody. And no rank waits in vain:
who has declined a meeting, or has come to a later one, says so, again whenever its next meeting is another one.
"""

from __future__ import annotations

from mpitrain.collectives.meeting import DIGEST, LINE, NEXT, Meeting

__all__ = ["OptionalMeeting"]

# By how much an era raises the numbers. Even, so that the slots go on to take turns; else any will do, as ranks which
# are to meet are within one meeting of each other.
_ERA = 1 << 16


class OptionalMeeting(Meeting):
    """The meetings, one after the other; see `Meeting`.

    Their numbers tell the era and how many meetings have taken place before: equal on all ranks that are to meet.
    For one thread at a time; only waiting needs no care.

    Attributes:
        visitor: For what this rank has come; None if it has not, or has gone away since.
    """

    visitor: object | None = None
    _first_open = 1
    _eras_to_begin = 0

    @property
    def is_declined(self) -> bool:
        """Whether this rank has declined the next meeting."""
        return self._first_open > self.number + 1

    def come(self, digest: int, visitor: object) -> None:
        """Come to the next meeting, which this rank has not declined, and which is to be left by `leave`."""
        number = self.number + 1
        flag = self.next_slot * LINE
        self.own[flag + DIGEST] = digest
        self.fence()
        # Nothing is called from here on, where an interrupt could come in between.
        self.number = number
        self.visitor = visitor
        self.own[flag] = number

    def leave(self, *, took_place: bool) -> None:
        """Go away from a meeting that has taken place, or cannot."""
        self.visitor = None
        if not took_place:
            self.number -= 1
        eras, self._eras_to_begin = self._eras_to_begin, 0
        if eras:
            self._begin_eras(eras)

    def decline(self) -> None:
        """Say that this rank will not come to the next meeting; of one at which it waits it changes nothing."""
        self._open_from(self.number + (2 if self.visitor is None else 1))

    def begin_era(self) -> None:
        """Note what begins an era, which every rank does; one that waits at a meeting, when it leaves."""
        if self.visitor is None:
            self._begin_eras(1)
        else:
            self._eras_to_begin += 1

    def _begin_eras(self, count: int) -> None:
        self.number += count * _ERA
        self._open_from(self.number + 1)

    def _open_from(self, number: int) -> None:
        if number > self._first_open:
            self._first_open = number
            # Whoever sees that sees where this rank has come before.
            self.fence()
            self.own[NEXT] = number
