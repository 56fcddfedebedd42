"""The public face of the collectives."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from mpitrain.collectives import operations
from mpitrain.collectives.agreement import check_same_settings, read_settings
from mpitrain.collectives.allocation import Allocation
from mpitrain.collectives.context import Context
from mpitrain.collectives.departure import watch_exit
from mpitrain.collectives.objects import ObjectCollectives
from mpitrain.collectives.observer import Observer
from mpitrain.collectives.on_device import DeviceArrays
from mpitrain.collectives.optional_meeting import OptionalMeeting
from mpitrain.collectives.persistent import PersistentPlan
from mpitrain.collectives.plan import Plan
from mpitrain.collectives.progress import Handle, ProgressEngine
from mpitrain.collectives.quick_calls import QuickCalls
from mpitrain.collectives.reclaim import Free
from mpitrain.collectives.runner import Runner
from mpitrain.collectives.selection import known_algorithms
from mpitrain.collectives.table import Table
from mpitrain.collectives.table_file import load_table
from mpitrain.comm import Topology, Transport
from mpitrain.config import Settings
from mpitrain.memory import flat_view
from mpitrain.observe import show_messages

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["Communicator"]

Result = TypeVar("Result")


class Communicator(ObjectCollectives, Allocation):
    """Collectives among a group of ranks, on NumPy and CuPy arrays and torch tensors, on the host or on devices.

        comm = Communicator.from_mpi()
        total = comm.allreduce(array)                  # a new array
        handle = comm.allreduce_async_(array, op="average", algorithm="ring")
        ...
        handle.wait()                                  # array now holds the average

    The meaning is MPI's: all ranks call the same operations in the same order, and a call matches the
    call of the same place on the others, if all wait in it or none does. Names that end in `_` work in
    place; `_async` forms return a `Handle`. Arrays must be contiguous, and one that is used by an
    operation in flight must be left alone.

    A communicator owns duplicates of what it was made from, so its messages meet no others. Making,
    splitting and freeing one are collective: every rank must call.

    Args:
        transport: Carries the messages; the communicator owns it from now on.
        settings: Same on every rank; read from the environment if not given.
        engine: Advances asynchronous operations; shared among communicators of one process.
        table: What was measured about algorithms, same on every rank.
    """

    def __init__(
        self,
        transport: Transport,
        *,
        settings: Settings | None = None,
        engine: ProgressEngine | None = None,
        table: Table | None = None,
    ) -> None:
        self.settings = settings or Settings.from_environ()
        check_same_settings(transport, self.settings)
        self.topology = Topology.discover(transport)
        self.engine = engine or ProgressEngine.for_node(self.settings, self.topology)
        self._context = Context(transport, self.topology, self.settings, table)
        self._reclaimer = self._context.reclaimer
        self.devices = DeviceArrays(self._context, self.topology)
        self._runner = Runner(self._context, self.engine, self.devices)
        self._watch, self._calls = self._runner.watch, self._runner.calls
        self._memory = self._context.memory
        self._quick = QuickCalls()
        self._quick_arrays, self._quick_arrays_in_place = self._quick.of_arrays, self._quick.of_arrays_in_place
        self._freed = False
        self._observer = Observer(self.topology, self.settings, self.engine, self._watch, self._calls)
        self.timeline = self._observer.timeline

    @classmethod
    def from_mpi(
        cls, comm: MPI.Comm | Sequence[int] | None = None, *, settings: Settings | None = None
    ) -> Communicator:
        """Make a communicator of the ranks of an MPI communicator.

        Args:
            comm: Any intracommunicator, or ranks of the world of which each must call; the world if not given.
                It is duplicated, not used.
            settings: Same on every rank; read from the environment if not given.

        From now on, when this process ends, by an exception or not, the others get an error where they wait for it.

        Raises:
            UnavailableError: MPI lacks a thread level that the progress thread needs.
        """
        from mpitrain.comm.mpi import MPITransport  # starts MPI

        transport = MPITransport(comm)
        settings = read_settings(transport, settings)
        show_messages(settings.log_level)
        made = cls(transport, settings=settings, table=load_table(transport, settings))
        watch_exit(made)
        made._observer.start_timeline_of_job(settings.timeline)
        return made

    # Who and where

    @property
    def rank(self) -> int:
        """This rank, from 0 to `size - 1`."""
        return self._context.rank

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self._context.size

    def known_algorithms(self, collective: str) -> list[str]:
        """Return the names that the `algorithm` of a collective may have here.

        Raises:
            ValueError: No such collective.
        """
        return known_algorithms(collective, self._context.available)

    @property
    def transport(self) -> Transport:
        """What carries the messages."""
        return self._context.transport

    # Plans

    def plan_allreduce_(self, array: Any, **options: Any) -> PersistentPlan:
        """Prepare an `allreduce_` of `array`, with its options, that is run many times, as MPI-4's `Allreduce_init`.

        That all ranks mean the same is checked here, if `settings.check`, and not again. Every rank must call.
        """
        options["in_place"] = True
        waited_for = self._runner.checked(operations.plan_allreduce, array, **options)
        in_background = self._runner.checked(operations.plan_allreduce, array, **options, blocking=False)
        view = flat_view(array, writable=True)
        quick = None if waited_for.quick is None else waited_for.quick(self._runner, (-1,))
        return PersistentPlan(self, view, waited_for, in_background, quick)

    def _run(self, make_plan: Callable[..., Plan[Result]], *arguments: Any, **options: Any) -> Result:
        plan = self._runner.make(make_plan, arguments, options, blocking=True)
        result = self._runner.run(plan, check=self.settings.check)
        if plan.quick is not None:
            array = arguments[0]
            quick = plan.quick(self._runner, array.shape if type(array) is np.ndarray else (-1,))
            in_place = options.get("in_place", False)
            self._quick.remember(array, options["op"], options["algorithm"], quick, in_place=in_place)
        return result

    def _start(self, make_plan: Callable[..., Plan[Result]], *arguments: Any, **options: Any) -> Handle[Result]:
        plan = self._runner.make(make_plan, arguments, {"blocking": False, **options}, blocking=False)
        return self._runner.start(plan, check=self.settings.check)

    def start(self, plan: Plan[Result], *, check: bool = False) -> Handle[Result]:
        """Start a plan that was made for this communicator; every rank must start it."""
        return self._runner.start(plan, check=check)

    def run(self, plan: Plan[Result], *, check: bool = False) -> Result:
        """Run a plan that was made for this communicator; every rank must run it."""
        return self._runner.run(plan, check=check)

    # Life cycle

    def split(self, color: int | None, key: int | None = None) -> Communicator | None:
        """Make communicators of the ranks of one color, ordered by key (default: their rank).

        Every rank must call; where color is None, the result is None.
        """
        self._reclaimer.reclaim()
        transport = self.transport.split(color, self.rank if key is None else key)
        if transport is None:
            self._reclaimer.register_nothing()
            return None
        return self._related(transport, self.settings)

    def duplicate(self, settings: Settings | None = None) -> Communicator:
        """Make a communicator of the same ranks whose operations are independent of this one's.

        Every rank must call, with the same settings; those of this communicator if not given.
        """
        self._reclaimer.reclaim()
        return self._related(self.transport.duplicate(), settings or self.settings, is_duplicate=True)

    def _related(self, transport: Transport, settings: Settings, *, is_duplicate: bool = False) -> Communicator:
        table = self._context.choice.table
        made = Communicator(transport, settings=settings, engine=self.engine, table=table)
        if is_duplicate:
            made._context.memory.sharers = self._context.memory.sharers
        self._reclaimer.register(made, made._context.free)
        if transport.native is not None:
            watch_exit(made)
        return made

    def make_optional_meeting(self, slot_nbytes: int) -> OptionalMeeting | None:
        """Make a place where ranks of one node meet if all come by themselves. Every rank must call.

        Args:
            slot_nbytes: Size of the largest array that is brought along; a multiple of 16.

        Returns:
            None, on all ranks, where they are on several nodes or share no memory.
        """
        return self._context.make_optional_meeting(slot_nbytes)

    def free_with(self, owner: object, free: Free) -> None:
        """Have `free`, which must not refer to it, called after `owner` is dead on all ranks. Every rank must call."""
        self._reclaimer.register(owner, free)

    def adopt(self, other: Communicator) -> None:
        """Free another communicator of the same ranks, and what was made from it, when nobody refers to it any more.

        Every rank must call, with nothing in flight on the other one, which cannot be used any more.
        """
        self._reclaimer.adopt(other._reclaimer)
        self._reclaimer.register(other, other._context.free)
        self._reclaimer.reclaim()

    @property
    def is_revoked(self) -> bool:
        """Whether this rank knows that the communicator was given up."""
        return self._watch.revoked is not None

    def revoke(self, reason: str) -> None:
        """Give the communicator up: operations that this rank has not completed raise `CommRevokedError` on all."""
        self._watch.give_up(reason, self._calls.number)

    def before_leaving(self, function: Callable[[str], None]) -> None:
        """Have `function(reason)` called when this rank leaves: a bound method, which is held weakly."""
        self._watch.leave_functions.append(weakref.WeakMethod(function))

    def while_waiting(self, function: Callable[[], None]) -> None:
        """Have `function()` called now and then while an operation waits for other ranks: a bound method, held weakly.

        It must not wait for anything itself.
        """
        self._watch.idle_functions.append(weakref.WeakMethod(function))

    def leave(self, reason: str) -> None:
        """Tell the other ranks that this one calls no further operation, so that none waits for it in vain.

        What is in flight here is given up. Earlier operations are not disturbed on ranks that are still busy with them.
        """
        self._watch.leave(reason)

    def await_departures(self, limit_s: float) -> bool:
        """Whether all other ranks have left, or leave within so many seconds."""
        return self._watch.await_departures(limit_s)

    @property
    def is_freed(self) -> bool:
        """Whether `free` was called."""
        return self._freed

    def free(self) -> None:
        """Release the communicator. Every rank must call, when no operation is in flight."""
        if not self._freed:
            self._freed = True
            self._watch.close("this rank, which has freed it")
            self._context.free()
