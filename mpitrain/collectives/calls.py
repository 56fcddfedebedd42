"""The calls of one communicator: numbered in their order, which is the same on all ranks, and which are in flight."""

from __future__ import annotations

import threading

__all__ = ["Calls"]


class Calls:
    """Counts calls, as they begin and as they end, mostly in the progress thread.

    Attributes:
        lock: Held by whoever begins a call, also while taking what calls use in their order.
        number: Of the next call, counted from 0.
        nbytes: Of the arrays that this rank has brought to them.
        in_flight: Numbers of those that have begun and not ended.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.number = 0
        self.nbytes = 0
        self.in_flight: set[int] = set()

    def begin(self, nbytes: int) -> int:
        """Return the number of a call that begins; for the holder of the lock."""
        index = self.number
        self.number = index + 1
        self.nbytes += nbytes
        self.in_flight.add(index)
        return index

    def end(self, index: int) -> None:
        """Note that a call has ended."""
        with self.lock:
            self.in_flight.discard(index)

    def note_waiting(self, index: int) -> None:
        """Have a call in flight that is not in general, as it ends at once unless it has to wait."""
        with self.lock:
            self.in_flight.add(index)

    def first_unfinished(self) -> int:
        """Return the first call in flight; the next one if there is none."""
        with self.lock:
            return min(self.in_flight, default=self.number)
