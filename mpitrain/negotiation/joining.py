"""What ranks do for those that have joined: have run out of data, and wait until all have.

A named operation is complete when the ranks that have not joined have announced it. Rank 0's decision then carries what
was announced, so that a rank that has joined takes part without knowing the operation: with what changes nothing,
zeros to a sum. What cannot be without it, a broadcast from it or rows sent to it, is an error on all others.

Steps, of an optimizer say, are operations of the whole group that are not negotiated, because all ranks run them in the
same order. As long as nobody has joined they cost nothing here. A rank that joins is missed in the next step by all
others; while they wait they look for news, learn from rank 0 who has joined, and from then on announce each of their
steps. Once all have entered a step, rank 0 has those that have joined stand in. A step that ends without them, as they
had made it before they joined, is announced only by those that were not through with it: they take that back.
"""

from __future__ import annotations

import itertools
import math
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from mpitrain.memory import FlatArray, dtype_named, fill_neutral, parse_op
from mpitrain.negotiation.announcement import Announcement

__all__ = [
    "JOIN",
    "STEP",
    "STEP_END",
    "Steps",
    "UnnamedOperations",
    "find_absence_problem",
    "neutral_announcement",
    "neutral_arrays",
]

# Collectives of announcements that move no data themselves.
JOIN = "join"
STEP = "step"
STEP_END = "end of step"

# What has rows of each rank: one that has joined brings none.
_RAGGED = ("allgather", "alltoall")


def find_absence_problem(announcements: Mapping[int, Announcement], absent: Sequence[int]) -> str:
    """Return why an operation cannot be without the ranks that have joined; "" if it can.

    Args:
        announcements: Of the other ranks, by rank; they fit together.
        absent: Ranks that have joined.
    """
    first = next(iter(announcements.values()))
    if first.collective == "broadcast" and first.root in absent:
        return (
            f"{first.name}: rank {first.root} has joined, and brings nothing to broadcast; "
            "broadcast from a rank that still has data"
        )
    for rank in sorted(announcements):
        lost = [dest for dest in absent if announcements[rank].splits[dest : dest + 1] not in ((), (0,))]
        if lost:
            return (
                f"{first.name}: rank {rank} sends rows to ranks {lost}, which have joined and take none; "
                f"pass splits that are 0 for them, got {list(announcements[rank].splits)}"
            )
    return ""


def neutral_announcement(announcement: Announcement) -> Announcement:
    """Return what a rank that has joined would have announced, from what another one has."""
    tensors, splits = announcement.tensors, announcement.splits
    if announcement.collective in _RAGGED:
        tensors = tuple(tensor._replace(shape=(0, *tensor.shape[1:])) for tensor in tensors)
        splits = (0,) * len(splits)
    # What changes nothing must not be scaled.
    return announcement._replace(tensors=tensors, splits=splits, prescale=1.0)


def neutral_arrays(announcement: Announcement) -> list[FlatArray]:
    """Return what a rank that has joined brings: what leaves the result to the others."""
    arrays = []
    for tensor in announcement.tensors:
        dtype = dtype_named(tensor.dtype)
        data = np.zeros(math.prod(tensor.shape), dtype.storage)
        if announcement.op:
            fill_neutral(data, parse_op(announcement.op), dtype)
        arrays.append(FlatArray(data, dtype, tensor.shape, "cpu", data.reshape(tensor.shape)))
    return arrays


class UnnamedOperations:
    """Names for operations that their callers have not named.

    Ranks match them by how many they have started since all had joined, so all must start them in the same order.
    """

    def __init__(self) -> None:
        self._num_joins = 0
        self._numbers = itertools.count()

    def next_name(self) -> str:
        """Return the name of the next one."""
        return f"noname.{self._num_joins}.{next(self._numbers)}"

    def begin_anew(self) -> None:
        """Note that all ranks have joined."""
        self._num_joins += 1
        self._numbers = itertools.count()


class Steps:
    """The steps of one group that are negotiated only while ranks have joined.

    Args:
        start: Announces a step by name.
        end: Takes back what was announced, unless it is decided.
    """

    def __init__(self, start: Callable[[str], Any], end: Callable[[str], Any]) -> None:
        self._start = start
        self._end = end
        # Whoever announces a step has done so before another thread takes it back.
        self._lock = threading.RLock()
        # By number of whoever makes steps: what a rank that has joined does instead, and how many steps there were.
        self._stand_ins: list[Callable[[], Callable[[], None] | None]] = []
        self._counts: list[int] = []
        # Entered, and not announced.
        self._entered: dict[int, str] = {}
        self.absent: tuple[int, ...] = ()

    def register(self, stand_in: Callable[[], None]) -> int:
        """Return the number of one more that makes steps; every rank must call, in the same order.

        Args:
            stand_in: Takes part in a step without data; a bound method, which is held weakly.
        """
        self._stand_ins.append(weakref.WeakMethod(stand_in))
        self._counts.append(0)
        return len(self._counts) - 1

    @contextmanager
    def entered(self, number: int) -> Iterator[None]:
        """Mark a step, in which the caller waits for all ranks."""
        self._counts[number] += 1
        self._entered[number] = name = f"{STEP}.{number}.{self._counts[number]}"
        # Whoever comes second, this thread or the one that learns of a rank that has joined, sees what the other did.
        if self.absent:
            self._announce()
        try:
            yield
        finally:
            if self._entered.pop(number, None) is None:
                with self._lock:
                    self._end(name)

    def note_absent(self, absent: tuple[int, ...]) -> None:
        """Take note of the ranks that have joined, and announce the steps that are under way."""
        self.absent = absent
        if absent:
            self._announce()

    def _announce(self) -> None:
        with self._lock:
            for number in list(self._entered):
                if name := self._entered.pop(number, None):
                    self._start(name)

    def stand_in_of(self, name: str) -> Callable[[], None]:
        """Return what a rank that has joined does for a step of this name."""
        number, count = map(int, name.split(".")[1:])
        if count <= self._counts[number]:
            # This rank made the step with data before it joined, and another one is not through with it yet.
            return _nothing
        self._counts[number] = count
        stand_in = self._stand_ins[number]()
        if stand_in is None:
            raise RuntimeError(f"{name}: what makes these steps is gone on this rank; keep the optimizer until join")
        return stand_in


def _nothing() -> None:
    pass
