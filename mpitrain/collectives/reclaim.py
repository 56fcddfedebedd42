"""Frees, on all ranks together, what has been garbage-collected on each of them at its own time.

MPI communicators and shared windows are freed collectively, but a rank's garbage collector runs when it likes. So what
is dead on a rank is only noted there; at the next occasion on which all ranks call something together, they compare
notes and free what is dead on all.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable

from mpitrain.comm import Transport

__all__ = ["Reclaimer"]


class Reclaimer:
    """What hangs on one communicator and is to be freed with its ranks.

    Args:
        transport: Of the communicator.
    """

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._numbers = itertools.count()
        self._free: dict[int, Callable[[], None]] = {}
        self._dead: set[int] = set()

    def register(self, owner: object, free: Callable[[], None]) -> None:
        """Have `free` called once `owner` is dead on all ranks; every rank must register, in the same order.

        `free` must not refer to the owner, and may be called after an explicit call of its own.
        """
        number = next(self._numbers)
        self._free[number] = free
        weakref.finalize(owner, self._dead.add, number).atexit = False

    def register_nothing(self) -> None:
        """Take part in a registration that concerns other ranks only."""
        self._dead.add(number := next(self._numbers))
        self._free[number] = lambda: None

    def reclaim(self) -> None:
        """Free what is dead on all ranks. Every rank must call, where it may block."""
        if not self._free:
            return
        everybodys = self._transport.gather_everywhere(frozenset(self._dead))
        for number in sorted(frozenset.intersection(*everybodys)):
            self._dead.discard(number)
            self._free.pop(number)()
