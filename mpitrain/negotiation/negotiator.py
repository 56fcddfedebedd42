"""Named operations: matched by name, in whatever order ranks start them.

Each rank announces the operations that it is ready for to rank 0, which decides what all run next. Announcements
leave at once, in the thread that starts an operation; all else is done by one task that the progress engine advances
for as long as an operation of this rank is undecided. A rank with none sends and receives nothing.
"""

from __future__ import annotations

import contextlib
import functools
import pickle
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from mpitrain.collectives import Communicator, Handle, Task
from mpitrain.errors import CommError
from mpitrain.memory import DTYPES, flat_view
from mpitrain.negotiation.announcement import Announcement, Decision, tensors_of
from mpitrain.negotiation.coordinator import Coordinator
from mpitrain.negotiation.device_arrays import start_staged
from mpitrain.negotiation.execution import Entry, Results, contiguous, neutral_entries, run_decision
from mpitrain.negotiation.failures import as_collective_error, error_of, error_of_closing, error_of_name
from mpitrain.negotiation.joining import JOIN, STEP, STEP_END, Steps, UnnamedOperations
from mpitrain.negotiation.refusals import Refusals
from mpitrain.negotiation.stalls import StallWatch, Waiting

__all__ = ["Negotiator"]

_COORDINATOR = 0


class Negotiator:
    """Runs the named operations of one group of ranks.

    Args:
        comm: The group. Its collectives and its messages are duplicated, so every rank must call.

    Attributes:
        group: The communicator that was given. Its operations are never used here: they belong to the threads that
            set something up for the group, in the order of their calls.
        comm: The duplicate that the named operations run on, in the order of decisions.
        settings: Of the group.
        steps: Operations of the group that are not negotiated unless ranks have joined.
    """

    def __init__(self, comm: Communicator) -> None:
        self.group = comm
        self.comm = comm.duplicate(comm.settings.replace(check=False))
        self.settings = comm.settings
        self._control = comm.transport.duplicate()
        comm.free_with(self, self._control.free)
        self._coordinator: Coordinator | None = None
        if comm.rank == _COORDINATOR:
            itemsizes = {name: dtype.itemsize for name, dtype in DTYPES.items()}
            self._coordinator = Coordinator(comm.size, comm.settings.fusion_nbytes, itemsizes)
        self._lock = threading.Lock()
        # Guards what the threads that start operations and the one that serves share: all of the next lines.
        self._names: set[str] = set()
        self._undecided: dict[str, Entry] = {}
        self._refusals = Refusals()
        self._is_serving = False
        self._closing: Decision | None = None
        self._own_announcements: list[Announcement] = []
        self._unnamed = UnnamedOperations()
        # What hears of steps for as long as this rank has joined.
        self._stand_in: Callable[[Callable[[], None]], None] | None = None
        self._stalls = StallWatch(comm.settings, comm.rank, comm.size)
        self.steps = Steps(self._start_step, self._end_step)
        comm.before_leaving(self.leave)
        # A rank that waits for something else, or for nothing, learns of those that have joined; rank 0 also of those
        # that wait for a named operation which it has not started.
        comm.while_waiting(self.attend)
        if comm.size > 1 and self._coordinator is not None:
            comm.engine.serve_regularly(self.attend)

    def start(
        self,
        name: str,
        collective: str,
        arrays: Sequence[Any] = (),
        *,
        op: str = "",
        root: int = -1,
        prescale: float = 1.0,
        postscale: float = 1.0,
        splits: Sequence[int] = (),
        in_place: bool = False,
    ) -> Handle[Results]:
        """Announce an operation.

        Args:
            name: Equal on all ranks that mean the same operation.
            collective: See `Announcement`; likewise the other arguments.
            arrays: One, or all of a grouped operation. Copied if they are not contiguous and not `in_place`.
            op: See `Announcement`.
            root: See `Announcement`.
            prescale: See `Announcement`.
            postscale: See `Announcement`.
            splits: See `Announcement`.
            in_place: Results replace the inputs (all-reduce, broadcast), which must be contiguous.

        Returns:
            Handle of a list with one result per array; for an all-gather and an all-to-all of pairs with the rows
            that came from each rank.

        Raises:
            ValueError: An operation of this name is in flight here, or this rank has joined.
            ValueError, TypeError: An array that cannot be communicated.
        """
        if not in_place:
            arrays = [contiguous(array) for array in arrays]
        views = [flat_view(array, name=name, writable=in_place) for array in arrays]
        tensors = tensors_of(collective, views)
        announcement = Announcement(name, collective, tensors, op, root, prescale, postscale, tuple(splits))
        enter = functools.partial(self._enter, announcement, in_place=in_place)
        if all(view.is_host for view in views):
            return enter(list(arrays))
        refuse = functools.partial(self.refuse, name, collective)
        return start_staged(self.comm, f"{collective} {name}", views, enter, refuse, in_place=in_place)

    def await_name(self, name: str) -> None:
        """Return when no operation of this name is in flight here."""
        if name in self._names:
            self.comm.engine.wait_until(lambda: name not in self._names, name)

    def refuse(self, name: str, collective: str, problem: str) -> None:
        """Say that this rank cannot take part in an operation that others may start; they get an error.

        Nothing is said if an operation of this name is in flight here.
        """
        if self.comm.size > 1:
            # What it raises instead matters more than that the others cannot be told.
            with contextlib.suppress(ValueError, CommError):
                self._enter(Announcement(name, collective, problem=problem), [], in_place=False)

    def join(self, stand_in: Callable[[Callable[[], None]], None]) -> Handle[Results]:
        """Say that this rank has run out of data: until all ranks have joined it takes part with what changes nothing.

        Meanwhile it can start no operation.

        Args:
            stand_in: Called, by whichever thread, with what this rank has to call, soon and in order, to take part in
                the steps of the others.

        Returns:
            Handle of a list with the rank that has joined last.
        """
        with self._lock:
            self._stand_in = stand_in
        return self._enter(Announcement(JOIN, JOIN), [], in_place=False)

    def _start_step(self, name: str) -> None:
        self._enter(Announcement(name, STEP), [], in_place=False)

    def _end_step(self, name: str) -> None:
        with self._lock:
            entry = self._undecided.pop(name, None)
        if entry is not None:
            self._forget([entry])
            with contextlib.suppress(CommError), self._lock:
                self._announce(Announcement(name, STEP_END))

    def _enter(self, announcement: Announcement, arrays: list[Any], *, in_place: bool) -> Handle[Results]:
        name, collective = announcement.name, announcement.collective
        handle = self.comm.engine.promise(f"{collective} {name}")
        entry = Entry(announcement, arrays, in_place, handle, time.monotonic())
        with self._lock:
            if self._closing is not None:
                handle.reject(error_of_closing(name, self._closing))
                return handle
            if self._stand_in is not None and collective != JOIN:
                raise ValueError(f"{name}: cannot be started on a rank that has joined; wait until join has returned")
            if name in self._names:
                raise error_of_name(name)
            entry.observe(self.comm.engine.recorder)
            if not self._refusals.put_behind(entry):
                self._submit(entry)
            if not announcement.problem:
                self._names.add(name)
            must_serve = not self._is_serving
            self._is_serving = True
        if must_serve:
            self.comm.engine.start(self._serve(), "negotiation")
        return handle

    def _submit(self, entry: Entry) -> None:
        self._announce(entry.announcement)
        if entry.announcement.problem:
            self._refusals.put(entry)
        else:
            self._undecided[entry.announcement.name] = entry

    def next_name(self) -> str:
        """Return a name for an operation that the caller has not named; see `UnnamedOperations`."""
        return self._unnamed.next_name()

    def attend(self) -> None:
        """Look for what other ranks have said, though this one may have started nothing."""
        with self._lock:
            if self._is_serving or self._closing is not None:
                return
            self._is_serving = True
        self.comm.engine.start(self._serve(), "negotiation")

    def leave(self, reason: str) -> None:
        """End here: this rank takes part in no further operation. The others are told, so that none waits in vain."""
        if self._close(Decision((), reason="left", closed=f"this rank {reason}")):
            # Whoever cannot be told learns it from the transport.
            with contextlib.suppress(CommError):
                self._tell_of_leaving(reason)
        self.comm.leave(reason)

    def free(self) -> None:
        """Release the communicators. Every rank must call, when no operation is in flight."""
        self._control.free()
        self.comm.free()

    # What this rank says

    def _announce(self, announcement: Announcement) -> None:
        if self._coordinator is not None:
            self._own_announcements.append(announcement)
        else:
            self._control.notify(_COORDINATOR, pickle.dumps(announcement))

    def _tell_of_leaving(self, reason: str) -> None:
        if self._coordinator is not None:
            self._broadcast([Decision((), reason="left", closed=f"rank {self.comm.rank} {reason}")])
        else:
            self._control.notify(_COORDINATOR, pickle.dumps(reason))

    def _broadcast(self, decisions: list[Decision]) -> None:
        data = pickle.dumps(decisions)
        for rank in range(self.comm.size):
            if rank != _COORDINATOR:
                self._control.notify(rank, data)

    # What the engine advances

    def _serve(self) -> Task[None]:
        try:
            while True:
                moved = self._coordinate() if self._coordinator is not None else self._obey()
                with self._lock:
                    is_waiting = bool(self._undecided) or self._refusals.keep_waiting
                    if not is_waiting and not moved:
                        self._is_serving = False
                        return
                if is_waiting:
                    yield moved
        except (Exception, KeyboardInterrupt) as error:
            # Nobody else would decide: without this, whoever waits here or elsewhere would wait for ever.
            reason = f"has failed with {type(error).__name__}: {error}"
            self._close(Decision((), reason="broken", closed=f"this rank {reason}"))
            with contextlib.suppress(CommError):
                self._tell_of_leaving(reason)
            raise

    def _coordinate(self) -> bool:
        assert self._coordinator is not None
        now_s = time.monotonic()
        with self._lock:
            own, self._own_announcements = self._own_announcements, []
        for announcement in own:
            self._coordinator.announce(self.comm.rank, announcement, now_s)
        notices = self._control.notices()
        for rank, data in notices:
            message = pickle.loads(data)
            if isinstance(message, str):
                self._coordinator.leave(rank, message)
            else:
                self._coordinator.announce(rank, message, now_s)
        if own or notices:
            # More may be on the way: what becomes ready together is fused.
            return True
        decisions = self._coordinator.decide() + self._stalls.inspect(self._coordinator, self._waiting, now_s)
        if decisions:
            self._broadcast(decisions)
            if self.comm.engine.recorder is not None:
                self.comm.engine.recorder.mark_cycle([name for decision in decisions for name in decision.names])
            self._carry_out(decisions)
        return bool(decisions)

    def _obey(self) -> bool:
        notices = self._control.notices()
        for _, data in notices:
            self._carry_out(pickle.loads(data))
        if not notices and (reason := self._stalls.inspect_alone(self._waiting, time.monotonic())):
            self._tell_of_leaving(f"has given up: {reason}")
            self._give_up(Decision((), reason=self._stalls.reason, closed=reason))
        return bool(notices)

    def _waiting(self) -> Waiting:
        with self._lock:
            undecided = [(name, entry.since_s) for name, entry in self._undecided.items() if name != JOIN]
            return Waiting(undecided, [(each.announcement.name, each.since_s) for each in self._refusals.waiting()])

    def _give_up(self, closing: Decision) -> None:
        self._close(closing)
        if closing.reason == "stalled":
            # Whoever is missing may wait for the optimizer steps of the others: they end as well.
            self.group.leave(f"has given up: {closing.closed}")

    def _carry_out(self, decisions: list[Decision]) -> None:
        for decision in decisions:
            if decision.closed:
                self._give_up(decision)
                continue
            if not decision.names:
                self.steps.note_absent(decision.absent)
                continue
            entries = self._entries_of(decision)
            if not entries:
                continue  # an error of what this rank never started, or has given up
            for entry in entries:
                entry.enter("in flight")
            if decision.error:
                self._fail(entries, error_of(decision))
                continue
            collective = entries[0].announcement.collective
            if collective == JOIN:
                self._end_join()
            if collective in (JOIN, STEP):
                self._forget(entries)
                entries[0].handle.resolve([decision.last])
                continue
            try:
                task = run_decision(self.comm, decision, entries)
            except (ValueError, TypeError) as error:
                # It has no meaning on any rank: all fail alike, and nothing was started.
                self._fail(entries, error)
                continue
            except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001  (the handles have it)
                # The others may have started what this rank could not: their collectives match no longer.
                self.comm.revoke(f"{decision.names[0]}: {type(error).__name__}: {error}")
                self._fail(entries, as_collective_error(error))
                continue
            self.comm.engine.start(self._finish(task, entries), ", ".join(decision.names))

    def _entries_of(self, decision: Decision) -> list[Entry]:
        """Take the operations of a decision out of those that wait for one."""
        with self._lock:
            entries = [entry for name in decision.names if (entry := self._take(name))]
            stand_in = self._stand_in
        if entries or stand_in is None or self.comm.rank not in decision.absent:
            return entries
        first = decision.announced[0]
        if first.collective == STEP:
            stand_in(self.steps.stand_in_of(first.name))
            return []
        return neutral_entries(decision, self.comm.engine)

    def _take(self, name: str) -> Entry | None:
        was_refused, following = self._refusals.decided(name)
        if following is not None:
            self._submit(following)
        return None if was_refused else self._undecided.pop(name, None)

    def _end_join(self) -> None:
        self.steps.note_absent(())
        with self._lock:
            self._unnamed.begin_anew()
            self._stand_in = None

    def _finish(self, task: Task[list[Results]], entries: list[Entry]) -> Task[None]:
        try:
            results = yield from task
        except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001  (the handles have it)
            self._fail(entries, as_collective_error(error))
            return
        self._forget(entries)
        for entry, result in zip(entries, results, strict=True):
            entry.handle.resolve(result)

    def _fail(self, entries: Sequence[Entry], error: BaseException) -> None:
        self._forget(entries)
        for entry in entries:
            entry.handle.reject(error)

    def _forget(self, entries: Sequence[Entry]) -> None:
        """Free the names; before the handles are done, so that whoever waits for one may use its name again."""
        with self._lock:
            self._names.difference_update(entry.announcement.name for entry in entries)
        for entry in entries:
            entry.enter("")

    def _close(self, closing: Decision) -> bool:
        """End what is undecided, and all that will be started; whether that was not done before."""
        with self._lock:
            is_first = self._closing is None
            self._closing = self._closing or closing
            entries = [*self._undecided.values(), *self._refusals.clear()]
            self._undecided.clear()
        for entry in entries:
            self._fail([entry], error_of_closing(entry.announcement.name, closing))
        return is_first
