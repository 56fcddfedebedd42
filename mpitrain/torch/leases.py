"""Communicators that are lent to the optimizers of a group, and freed when no rank uses them any more.

An MPI library has room for some thousand communicators and all ranks must free one together, while Python drops an
optimizer whenever it likes. So each rank notes what it has dropped, and at the next occasion the ranks compare notes.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

from mpitrain.collectives import Communicator, Handle

__all__ = ["Lease", "Lender", "lender_of"]


class Lease:
    """A communicator on loan.

    Attributes:
        comm: For the borrower alone.
        started: What the borrower has started on it and not waited for; kept up to date by the borrower.
    """

    def __init__(self, comm: Communicator, borrower: object) -> None:
        self.comm = comm
        self.started: list[Handle[Any]] = []
        self._borrower = weakref.ref(borrower)
        self._has_ended = False

    def end(self) -> None:
        """Give the communicator back; the borrower uses it no more."""
        self._has_ended = True

    @property
    def is_over(self) -> bool:
        """Whether nobody here uses the communicator any more."""
        is_dropped = self._has_ended or self._borrower() is None
        return is_dropped and all(handle.done for handle in self.started)


class Lender:
    """The leases of one group, numbered alike on all ranks."""

    def __init__(self) -> None:
        self._leases: dict[int, Lease] = {}
        self._number = 0

    def lend(self, group: Communicator, borrower: object) -> Lease:
        """Make a communicator of the group for a borrower, whose end is noticed. Every rank must call."""
        lease = Lease(group.duplicate(group.settings.replace(check=False)), borrower)
        self._leases[self._number] = lease
        self._number += 1
        return lease

    def returned(self) -> list[int]:
        """Return the numbers of the leases that are over on this rank, for `free`."""
        return [number for number, lease in self._leases.items() if lease.is_over]

    def free(self, returned: Sequence[Sequence[int]]) -> None:
        """Free what all ranks have returned. Every rank must call, with the `returned` of all."""
        for number in sorted(set(returned[0]).intersection(*returned)):
            self._leases.pop(number).comm.free()


_lenders: weakref.WeakKeyDictionary[Communicator, Lender] = weakref.WeakKeyDictionary()


def lender_of(group: Communicator) -> Lender:
    """Return the one lender of a group."""
    return _lenders.setdefault(group, Lender())
