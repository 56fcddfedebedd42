"""How the plans of a communicator become calls: each takes its number, all ranks agree on it, and it is guarded."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, TypeVar, cast

from mpitrain.collectives.agreement import FALL_BACK, agree
from mpitrain.collectives.calls import Calls
from mpitrain.collectives.context import Context
from mpitrain.collectives.executor import Task
from mpitrain.collectives.on_device import DeviceArrays
from mpitrain.collectives.peers import PeerWatch
from mpitrain.collectives.plan import Call, Plan, empty_plan, is_empty
from mpitrain.collectives.progress import Handle, ProgressEngine
from mpitrain.errors import CollectiveMismatchError
from mpitrain.memory import is_on_device

__all__ = ["Runner"]

Result = TypeVar("Result")

# Tags are used in turn: far more than there are operations in flight, within the bound of every MPI library.
_MOST_TAGS = 32768


class Runner:
    """Runs plans, on each rank in the same order.

    Args:
        context: Of the communicator.
        engine: Advances asynchronous operations.
        devices: Makes the plans of arrays on devices.

    Attributes:
        calls: What has been called.
        watch: News of the other ranks.
    """

    def __init__(self, context: Context, engine: ProgressEngine, devices: DeviceArrays) -> None:
        self.engine = engine
        self.calls = Calls()
        self.watch = PeerWatch(context.transport, context.settings, self.calls)
        self._context = context
        self._devices = devices
        self._check = context.settings.check

    def start(self, plan: Plan[Result], *, check: bool = False) -> Handle[Result]:
        """Start a plan; see `Communicator.start`."""
        description = f"{plan.description}, {plan.place}" if plan.place else plan.description
        return self.engine.start(self._call(plan, blocking=False, check=check), description, plan.leave)

    def run(self, plan: Plan[Result], *, check: bool = False) -> Result:
        """Run a plan; see `Communicator.run`."""
        return self.engine.drive(self._call(plan, blocking=True, check=check))

    def checked(self, make_plan: Callable[..., Plan[Result]], *arguments: Any, **options: Any) -> Plan[Result]:
        """Make a plan for a blocking call on which all ranks agree, if that is to be checked; every rank must call."""
        while True:
            plan = self.make(make_plan, arguments, options, blocking=True)
            check = empty_plan(plan.description)
            if not self._check or self.engine.drive(self._call(check, blocking=True, check=True)) is None:
                return plan

    def make(
        self,
        make_plan: Callable[..., Plan[Result]],
        arguments: tuple[Any, ...],
        options: dict[str, Any],
        *,
        blocking: bool,
    ) -> Plan[Result]:
        """Make a plan for a call that follows at once; if that fails, the others learn of it, and this rank raises."""
        self.watch.check(self.calls.number)
        try:
            if any(map(is_on_device, arguments)):
                return self._devices.plan(make_plan, arguments, options)
            return make_plan(self._context, *arguments, **options)
        except BaseException as error:
            text = f"cannot call: {type(error).__name__}: {error}"
            if self._check and isinstance(error, Exception):
                # The others may have brought good arguments and be waiting: tell them, then raise. In their
                # form, as blocking and asynchronous calls compare what they bring in different ways.
                with contextlib.suppress(CollectiveMismatchError):
                    self.engine.drive(self._call(empty_plan(text), blocking=blocking, check=True))
            elif not isinstance(error, (ValueError, TypeError)):
                self.watch.give_up(text, self.calls.number)  # no argument, which all ranks may have in common
            raise

    def _call(self, plan: Plan[Result], *, blocking: bool, check: bool) -> Task[Result]:
        """Return the guarded task of one call; taking its number here keeps calls in order on all ranks."""
        self.watch.check(self.calls.number)
        if plan.enter is not None:
            self.watch.attempt(plan.enter, plan.description, self.calls.number)
        context = self._context
        agrees_natively = check and context.meeting is None
        # A plan that falls back may need whatever there is.
        may_fall_back = plan.fallback is not None
        starts_native = context.has_native and (plan.uses_native or agrees_natively or may_fall_back)
        uses_node = may_fall_back and context.node is not None
        with self.calls.lock:
            index = self.calls.begin(plan.nbytes)
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
                self._devices.stage_from_now_on()
                if is_empty(plan):
                    is_over = True
                    return cast("Result", FALL_BACK)  # whoever checks makes another plan
                if plan.fallback is not None:
                    plan = self.watch.attempt(plan.fallback, plan.description, index)
                # By messages: other ranks may have given back their turn of the MPI library.
                disagreement = yield from self._agree(plan, call._replace(ticket=-1), index, check=check)
            if disagreement:
                # All ranks know and nothing was started, so the communicator stays usable.
                is_over = True
                raise CollectiveMismatchError(disagreement)
            if plan.uses_flags:
                yield from self.watch.guard(self._context.flag_users.turn(index), plan.description, index)
            task = plan.task(call) if call.trace is None else call.trace.watch(plan.task(call))
            result = yield from self.watch.guard(task, plan.description, index)
            is_over = True
            return result
        finally:
            if call.trace is not None:
                call.trace.end()
            self.calls.end(index)
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
            yield from self.watch.guard(plan.prepare(), plan.description, index)
        if not (check and self._context.size > 1) and plan.bring is None:
            return ""
        keep_turn = plan.uses_native or plan.fallback is not None
        agreement = agree(self._context, plan.description, call, plan.bring, keep_turn=keep_turn)
        return (yield from self.watch.guard(agreement, plan.description, index))

    # What calls without a plan need, see the module of that name

    def call_of(self, index: int) -> Call:
        """Return the blocking call of a number, with the tag of its messages."""
        return Call(index % min(self._context.transport.max_tag, _MOST_TAGS), blocking=True, number=index)

    def drive(self, task: Task[Any], description: str, index: int) -> Any:
        """Run a task of a call to its end; it raises when it cannot end."""
        self.calls.note_waiting(index)
        if self.watch.leaving:  # another thread has left before it could see this call wait
            self.watch.give_up(self.watch.leaving, index)
        try:
            return self.engine.drive(self.watch.guard(task, description, index))
        finally:
            self.calls.end(index)
