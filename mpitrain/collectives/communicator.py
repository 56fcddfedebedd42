"""The public face of the collectives."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, cast

from mpitrain.collectives import operations
from mpitrain.collectives.agreement import FALL_BACK, agree, check_same_settings, read_settings
from mpitrain.collectives.allocation import Allocation
from mpitrain.collectives.calls import Calls
from mpitrain.collectives.context import Context
from mpitrain.collectives.departure import watch_exit
from mpitrain.collectives.executor import Task
from mpitrain.collectives.objects import ObjectCollectives
from mpitrain.collectives.observer import Observer
from mpitrain.collectives.on_device import DeviceArrays
from mpitrain.collectives.peers import PeerWatch
from mpitrain.collectives.persistent import PersistentPlan
from mpitrain.collectives.plan import Call, Plan, empty_plan, is_empty
from mpitrain.collectives.progress import Handle, ProgressEngine
from mpitrain.collectives.quick import QuickAllreduce, QuickCalls
from mpitrain.collectives.reclaim import Free
from mpitrain.collectives.selection import known_algorithms
from mpitrain.collectives.small import SmallAllreduce
from mpitrain.collectives.table import Table
from mpitrain.collectives.table_file import load_table
from mpitrain.comm import Topology, Transport
from mpitrain.config import Settings
from mpitrain.errors import CollectiveMismatchError
from mpitrain.memory import flat_view, is_on_device
from mpitrain.observe import show_messages

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["Communicator"]

Result = TypeVar("Result")

# Tags are used in turn: far more than there are operations in flight, within the bound of every MPI library.
_MOST_TAGS = 32768


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
        self._calls = Calls()
        self._watch = PeerWatch(transport, self.settings, self._calls)
        self._reclaimer = self._context.reclaimer
        self.devices = DeviceArrays(self._context, self.topology)
        self._memory = self._context.memory
        self._quick = QuickCalls()
        self._freed = False
        self._observer = Observer(self.topology, self.settings, self.engine, self._watch)
        self._traffic, self.timeline = self._observer.traffic, self._observer.timeline

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
        waited_for = self._checked(operations.plan_allreduce, array, **options)
        in_background = self._checked(operations.plan_allreduce, array, **options, blocking=False)
        return PersistentPlan(self, flat_view(array, writable=True), waited_for, in_background)

    # How plans are run

    def _run(self, make_plan: Callable[..., Plan[Result]], *arguments: Any, **options: Any) -> Result:
        plan = self._try(make_plan, arguments, options, blocking=True)
        result = self.engine.drive(self._call(plan, blocking=True, check=self.settings.check))
        if plan.small is not None:
            signature = (arguments[0], options["op"], options["algorithm"])
            self._quick.remember(*signature, self.quick(plan, plan.small), in_place=options.get("in_place", False))
        return result

    def _start(self, make_plan: Callable[..., Plan[Result]], *arguments: Any, **options: Any) -> Handle[Result]:
        plan = self._try(make_plan, arguments, {"blocking": False, **options}, blocking=False)
        return self.start(plan, check=self.settings.check)

    def start(self, plan: Plan[Result], *, check: bool = False) -> Handle[Result]:
        """Start a plan that was made for this communicator; every rank must start it."""
        description = f"{plan.description}, {plan.place}" if plan.place else plan.description
        return self.engine.start(self._call(plan, blocking=False, check=check), description, plan.leave)

    def run(self, plan: Plan[Result], *, check: bool = False) -> Result:
        """Run a plan that was made for this communicator; every rank must run it."""
        return self.engine.drive(self._call(plan, blocking=True, check=check))

    def _checked(self, make_plan: Callable[..., Plan[Result]], *arguments: Any, **options: Any) -> Plan[Result]:
        while True:
            plan = self._try(make_plan, arguments, options, blocking=True)
            check = empty_plan(plan.description)
            if not self.settings.check or self.engine.drive(self._call(check, blocking=True, check=True)) is None:
                return plan

    def _try(
        self,
        make_plan: Callable[..., Plan[Result]],
        arguments: tuple[Any, ...],
        options: dict[str, Any],
        *,
        blocking: bool,
    ) -> Plan[Result]:
        self._watch.check(self._calls.number)
        try:
            if any(map(is_on_device, arguments)):
                return self.devices.plan(make_plan, arguments, options)
            return make_plan(self._context, *arguments, **options)
        except BaseException as error:
            text = f"cannot call: {type(error).__name__}: {error}"
            if self.settings.check and isinstance(error, Exception):
                # The others may have brought good arguments and be waiting: tell them, then raise. In their
                # form, as blocking and asynchronous calls compare what they bring in different ways.
                with contextlib.suppress(CollectiveMismatchError):
                    self.engine.drive(self._call(empty_plan(text), blocking=blocking, check=True))
            elif not isinstance(error, (ValueError, TypeError)):
                self.revoke(text)  # no argument, which all ranks may have in common
            raise

    def _call(self, plan: Plan[Result], *, blocking: bool, check: bool) -> Task[Result]:
        """Return the guarded task of one call; taking its number here keeps calls in order on all ranks."""
        self._watch.check(self._calls.number)
        if plan.enter is not None:
            self._watch.attempt(plan.enter, plan.description, self._calls.number)
        context = self._context
        agrees_natively = check and context.meeting is None
        # A plan that falls back may need whatever there is.
        may_fall_back = plan.fallback is not None
        starts_native = context.has_native and (plan.uses_native or agrees_natively or may_fall_back)
        uses_node = may_fall_back and context.node is not None
        with self._calls.lock:
            index = self._calls.begin()
            self._traffic.operations += 1
            self._traffic.nbytes += plan.nbytes
            ticket = context.native_order.take_ticket() if starts_native else -1
            staging_ticket = context.staging_order.take_ticket() if plan.uses_staging or uses_node else -1
            if plan.uses_flags or uses_node:
                context.flag_users.enter(index)
            if not blocking and context.meeting is not None:
                context.meeting.pass_by()
        call = self.call_of(index)._replace(blocking=blocking, ticket=ticket, staging_ticket=staging_ticket)
        return self._task(plan, call, index, check=check)

    def _task(self, plan: Plan[Result], call: Call, index: int, *, check: bool) -> Task[Result]:
        if (recorder := self.engine.recorder) is not None:
            call = call._replace(trace=recorder.operation(plan.description))
        is_over = False
        try:
            disagreement = yield from self._agree(plan, call, index, check=check)
            if disagreement == FALL_BACK:
                self.devices.stage_from_now_on()
                if is_empty(plan):
                    is_over = True
                    return cast("Result", FALL_BACK)  # whoever checks makes another plan
                if plan.fallback is not None:
                    plan = self._watch.attempt(plan.fallback, plan.description, index)
                # By messages: other ranks may have given back their turn of the MPI library.
                disagreement = yield from self._agree(plan, call._replace(ticket=-1), index, check=check)
            if disagreement:
                # All ranks know and nothing was started, so the communicator stays usable.
                is_over = True
                raise CollectiveMismatchError(disagreement)
            if plan.uses_flags:
                yield from self._watch.guard(self._context.flag_users.turn(index), plan.description, index)
            task = plan.task(call) if call.trace is None else call.trace.watch(plan.task(call))
            result = yield from self._watch.guard(task, plan.description, index)
            is_over = True
            return result
        finally:
            if call.trace is not None:
                call.trace.end()
            self._calls.end(index)
            # Of what has failed half way, no later one takes the turn: the others would take it for this one.
            if call.ticket >= 0 and is_over:
                self._context.native_order.give_back(call.ticket)
            if call.staging_ticket >= 0:
                self._context.staging_order.give_back(call.staging_ticket)
            if self._context.node is not None:
                self._context.flag_users.leave(index)

    def _agree(self, plan: Plan[Any], call: Call, index: int, *, check: bool) -> Task[str]:
        """Compare what all ranks bring, if that is asked for, when what this one brings is there."""
        if plan.prepare is not None:
            yield from self._watch.guard(plan.prepare(), plan.description, index)
        if not (check and self.size > 1) and plan.bring is None:
            return ""
        keep_turn = plan.uses_native or plan.fallback is not None
        agreement = agree(self._context, plan.description, call, plan.bring, keep_turn=keep_turn)
        return (yield from self._watch.guard(agreement, plan.description, index))

    # What calls without a plan need, see the module of that name

    def quick(self, plan: Plan[Any], small: SmallAllreduce) -> QuickAllreduce:
        """Return how to run what a plan runs at the meeting of the node's ranks, but for its arrays."""
        return QuickAllreduce(self._context, self, small, plan.description, spin=self.engine.spin_waiting)

    def take_number(self, nbytes: int) -> int:
        """Return the number of the next call, which begins now."""
        if self._watch.revoked is not None:
            self._watch.check(self._calls.number)
        calls = self._calls
        with calls.lock:
            index = calls.number
            calls.number = index + 1
            self._traffic.operations += 1
            self._traffic.nbytes += nbytes
        return index

    def call_of(self, index: int) -> Call:
        """Return the blocking call of a number, with the tag of its messages."""
        return Call(index % min(self.transport.max_tag, _MOST_TAGS), blocking=True, number=index)

    def give_up(self, reason: str, index: int) -> None:
        """Let all ranks know that a call has failed here."""
        self._watch.give_up(reason, index)

    def drive(self, task: Task[Any], description: str, index: int) -> Any:
        """Run a task of a call to its end; it raises when it cannot end."""
        self._calls.note_waiting(index)
        if self._watch.leaving:  # another thread has left before it could see this call wait
            self.give_up(self._watch.leaving, index)
        try:
            return self.engine.drive(self._watch.guard(task, description, index))
        finally:
            self._calls.end(index)

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
