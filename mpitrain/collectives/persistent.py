"""Collectives prepared once and run many times, as MPI-4 has them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mpitrain.collectives.plan import Plan
from mpitrain.collectives.progress import Handle
from mpitrain.collectives.quick import Quick
from mpitrain.memory import FlatArray

if TYPE_CHECKING:
    from mpitrain.collectives.communicator import Communicator

__all__ = ["PersistentPlan"]


class PersistentPlan:
    """A collective on one array, prepared for many runs; every rank runs it in its turn among all calls."""

    def __init__(
        self,
        comm: Communicator,
        view: FlatArray,
        waited_for: Plan[Any],
        in_background: Plan[Any],
        quick: Quick | None,
    ) -> None:
        self._comm = comm
        self._view = view
        self._waited_for = waited_for
        self._in_background = in_background
        self._quick = quick
        self.description = waited_for.description

    def run(self) -> Any:
        """Run it to its end."""
        if self._quick is None:
            return self._comm.run(self._waited_for)
        self._quick.run(self._view.data, self._view.data)
        return self._view.owner

    def start(self) -> Handle[Any]:
        """Start it; the array must be left alone until the handle is done."""
        return self._comm.start(self._in_background)
