"""What is done for the named operations in flight, by whichever thread has time: hears what is decided, and does it."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Sequence

from mpitrain.collectives import Communicator, Handle, Task
from mpitrain.errors import CommError
from mpitrain.negotiation.announcement import Decision
from mpitrain.negotiation.dialogue import Dialogue
from mpitrain.negotiation.execution import Entry, Results, neutral_entries, run_decision
from mpitrain.negotiation.failures import as_collective_error, error_of, error_of_closing
from mpitrain.negotiation.in_flight import InFlight
from mpitrain.negotiation.joining import JOIN, STEP, Steps, UnnamedOperations
from mpitrain.negotiation.shortcut import Attempt

__all__ = ["Service"]

# Between two looks for news while others do not come.
_INTERVAL_S = 0.02


class Service:
    """Serves the operations of one rank of a group.

    Args:
        dialogue: With the other ranks.
        in_flight: The operations.
        group: The communicator of the group.
        comm: What the operations run on.
        steps: Of the group.
        unnamed: Names of the group.
    """

    def __init__(
        self,
        dialogue: Dialogue,
        in_flight: InFlight,
        *,
        group: Communicator,
        comm: Communicator,
        steps: Steps,
        unnamed: UnnamedOperations,
    ) -> None:
        self._group = group
        self._comm = comm
        self._dialogue = dialogue
        self._in_flight = in_flight
        self._steps = steps
        self._unnamed = unnamed
        # Whoever starts an operation sees to it that somebody serves it.
        self._lock = threading.Lock()
        self._is_serving = False

    def begin(self) -> None:
        """Have it served, as long as anything waits for a decision; at least one look."""
        with self._lock:
            if self._is_serving:
                return
            self._is_serving = True
        self._comm.engine.start(self._serve(), "negotiation")

    def attend(self) -> None:
        """Look for what other ranks have said, though this one may have started nothing."""
        if self._in_flight.closing is None:
            self.begin()

    def _serve(self) -> Task[None]:
        try:
            while True:
                moved, decisions = self._dialogue.hear(self._in_flight.waiting)
                self._carry_out(decisions)
                with self._lock:
                    # What is entered from now on is served anew.
                    is_waiting = self._in_flight.awaits_decision
                    if not is_waiting and not moved:
                        self._is_serving = False
                        return
                if is_waiting:
                    yield moved
        except (Exception, KeyboardInterrupt) as error:
            self._break_down(error)
            raise

    def _break_down(self, error: BaseException) -> None:
        # Nobody else would decide: without this, whoever waits here or elsewhere would wait for ever.
        reason = f"has failed with {type(error).__name__}: {error}"
        self.close(Decision((), reason="broken", closed=f"this rank {reason}"))
        with contextlib.suppress(CommError):
            self._dialogue.tell_of_leaving(reason)

    def _give_up(self, closing: Decision) -> None:
        self.close(closing)
        if closing.reason == "stalled":
            # Whoever is missing may wait for the optimizer steps of the others: they end as well.
            self._group.leave(f"has given up: {closing.closed}")

    # Decisions

    def _carry_out(self, decisions: list[Decision]) -> None:
        recorder = self._comm.engine.recorder
        if decisions and self._dialogue.decides and recorder is not None:
            recorder.mark_cycle([name for decision in decisions for name in decision.names])
        for decision in decisions:
            if decision.closed:
                self._give_up(decision)
                continue
            if not decision.names:
                self._steps.note_absent(decision.absent)
                continue
            entries = self._entries_of(decision)
            if not entries:
                continue  # an error of what this rank never started, or has given up
            for entry in entries:
                entry.enter("in flight")
            if decision.error:
                self.fail(entries, error_of(decision))
                continue
            collective = entries[0].announcement.collective
            if collective == JOIN:
                self._end_join()
            if collective in (JOIN, STEP):
                self.forget(entries)
                entries[0].handle.resolve([decision.last])
                continue
            try:
                task = run_decision(self._comm, decision, entries)
            except (ValueError, TypeError) as error:
                # It has no meaning on any rank: all fail alike, and nothing was started.
                self.fail(entries, error)
                continue
            except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001  (the handles have it)
                # The others may have started what this rank could not: their collectives match no longer.
                self._comm.revoke(f"{decision.names[0]}: {type(error).__name__}: {error}")
                self.fail(entries, as_collective_error(error))
                continue
            self._comm.engine.start(self._finish(task, entries), ", ".join(decision.names))

    def _entries_of(self, decision: Decision) -> list[Entry]:
        """Take the operations of a decision out of those that wait for one."""
        entries, stand_in = self._in_flight.take(decision.names)
        if entries or stand_in is None or self._comm.rank not in decision.absent:
            return entries
        first = decision.announced[0]
        if first.collective == STEP:
            stand_in(self._steps.stand_in_of(first.name))
            return []
        return neutral_entries(decision, self._comm.engine)

    def _end_join(self) -> None:
        self._steps.note_absent(())
        self._unnamed.begin_anew()
        self._in_flight.end_join()

    def _finish(self, task: Task[list[Results]], entries: list[Entry]) -> Task[None]:
        try:
            results = yield from task
        except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001  (the handles have it)
            self.fail(entries, as_collective_error(error))
            return
        self.forget(entries)
        for entry, result in zip(entries, results, strict=True):
            entry.handle.resolve(result)

    # Operations that wait for others to come

    def complete(self, attempt: Attempt) -> Handle[Results]:
        """See to it that an attempt comes to its end though others come late, if at all; again it changes nothing."""
        self._comm.engine.start(self._complete(attempt), "negotiation")
        return attempt.entry.handle

    def _complete(self, attempt: Attempt) -> Task[None]:
        if attempt.is_taken_on:
            return
        attempt.is_taken_on = True
        entry = attempt.entry
        entry.observe(self._comm.engine.recorder)
        inspect = self._dialogue.stalls.watch(attempt.name, entry.since_s)
        next_look_s = 0.0
        try:
            while (takes_place := attempt.takes_place()) is None:
                now_s = time.monotonic()
                if now_s >= next_look_s:
                    next_look_s = now_s + _INTERVAL_S
                    self.attend()
                    if reason := inspect(attempt.missing, now_s):
                        closing = Decision((), reason=self._dialogue.stalls.reason, closed=reason)
                        self._dialogue.tell_of_end(closing)
                        self._give_up(closing)
                    if self._in_flight.closing is not None:
                        self.fail([entry], error_of_closing(attempt.name, self._in_flight.closing))
                        return
                yield False
            if takes_place:
                results = attempt.take()
                self.forget([entry])
                entry.handle.resolve(results)
            elif refused := attempt.announce_instead():
                self.fail([entry], error_of_closing(attempt.name, refused))
            else:
                self.begin()
        except (Exception, KeyboardInterrupt) as error:
            self._break_down(error)
            self.fail([entry], as_collective_error(error))
            raise

    # Ends

    def fail(self, entries: Sequence[Entry], error: BaseException) -> None:
        """Have operations raise."""
        self.forget(entries)
        for entry in entries:
            entry.handle.reject(error)

    def forget(self, entries: Sequence[Entry]) -> None:
        """Free the names; before the handles are done, so that whoever waits for one may use its name again."""
        self._in_flight.forget(entries)
        for entry in entries:
            entry.enter("")

    def close(self, closing: Decision) -> bool:
        """End what is undecided, and all that will be started; whether that was not done before."""
        is_first, entries = self._in_flight.close(closing)
        for entry in entries:
            self.fail([entry], error_of_closing(entry.announcement.name, closing))
        return is_first
