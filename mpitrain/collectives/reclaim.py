"""Frees, on all ranks together, what has been garbage-collected on each of them at its own time.

MPI communicators are freed collectively, but a rank's garbage collector runs when it likes. So what
is dead on a rank is only noted there; at the next occasion on which all ranks call something together, they compare
notes and free what is dead on all.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, TypeAlias

from mpitrain.comm import Transport

__all__ = ["Free", "Reclaimer"]


Free: TypeAlias = Callable[[], Callable[[], None] | Literal[False] | None]
"""Frees something; may return what is to be done once all ranks have freed it, or False if it cannot be freed."""


class _Registry(NamedTuple):
    """What is to be freed, by number, and the numbers of what is dead on this rank."""

    free: dict[int, Free]
    dead: set[int]


class Reclaimer:
    """What hangs on one communicator and is to be freed with its ranks.

    Args:
        transport: Of the communicator.
    """

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._numbers = itertools.count()
        self._own = _Registry({}, set())
        # Its own and what it has adopted, the same on all ranks.
        self._registries = [self._own]

    def __len__(self) -> int:
        """Return how much is not freed yet."""
        return sum(len(registry.free) for registry in self._registries)

    def register(self, owner: object, free: Free) -> None:
        """Have `free` called once `owner` is dead on all ranks; every rank must register, in the same order.

        `free` must not refer to the owner, and may be called after an explicit call of its own.
        """
        number = next(self._numbers)
        self._own.free[number] = free
        weakref.finalize(owner, self._own.dead.add, number).atexit = False

    def register_nothing(self) -> None:
        """Take part in a registration that concerns other ranks only."""
        self._own.dead.add(number := next(self._numbers))
        self._own.free[number] = lambda: None

    def adopt(self, other: Reclaimer) -> None:
        """Free also what hangs on another communicator of the same ranks, which has no occasions of its own any more.

        Every rank must call.
        """
        self._registries += other.hand_over()

    def hand_over(self) -> list[_Registry]:
        """Return what is not freed yet, for another to do it."""
        registries, self._own = self._registries, _Registry({}, set())
        self._registries = [self._own]
        return registries

    def reclaim(self) -> None:
        """Free what is dead on all ranks. Every rank must call, where it may block."""
        registries = [registry for registry in self._registries if registry.free]
        if not registries:
            return
        everybodys = self._transport.gather_everywhere([frozenset(registry.dead) for registry in registries])
        dying = []
        for index, registry in enumerate(registries):
            for number in sorted(frozenset.intersection(*(dead[index] for dead in everybodys))):
                registry.dead.discard(number)
                dying.append(registry.free.pop(number))
        self.free_together(dying)
        self._registries = [self._own, *(each for each in self._registries if each is not self._own and each.free)]

    def free_together(self, dying: Sequence[Free]) -> None:
        """Free things, as many and in the same order on all ranks, and finish each when all ranks have freed it."""
        finishes = [free() for free in dying]
        if not finishes:
            return
        everybodys = self._transport.gather_everywhere([finish is not False for finish in finishes])
        for finish, are_freed in zip(finishes, zip(*everybodys, strict=True), strict=True):
            # What one rank could not free may still refer to what the others have.
            if finish and all(are_freed):
                finish()
