"""Turns in the order of calls."""

from __future__ import annotations

import threading

__all__ = ["CallOrder"]


class CallOrder:
    """Lets what calls have in common be used in the order of the calls, which is the same on all ranks.

    An operation that the progress thread advances may get to the point where it needs its turn late.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._issued = 0
        self._current = 0
        self._left: set[int] = set()

    def take_ticket(self) -> int:
        """Return the next ticket; every rank takes them in the same order."""
        with self._lock:
            self._issued += 1
            return self._issued - 1

    def may_start(self, ticket: int) -> bool:
        """Whether all earlier tickets have been given back."""
        return ticket <= self._current

    def give_back(self, ticket: int) -> None:
        """The turn is over, or never comes; further calls with this ticket change nothing."""
        with self._lock:
            if ticket < self._current:
                return
            self._left.add(ticket)
            while self._current in self._left:
                self._left.remove(self._current)
                self._current += 1
