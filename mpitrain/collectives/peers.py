"""News about the other ranks of a communicator: who gave it up, who left, and who is waited for.

A rank that meets an error tells all others at once, so that they raise instead of waiting for it; so does a rank that
leaves the job. Either says from which operation on: those before it need nothing more of that rank, though another may
still be busy with them. Others look for news only while they wait and nothing moves, so it costs nothing otherwise.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from mpitrain.collectives.calls import Calls
from mpitrain.collectives.executor import Task
from mpitrain.collectives.listeners import Listeners
from mpitrain.comm import Transport
from mpitrain.config import Settings
from mpitrain.errors import CommError, CommRevokedError, CommTimeoutError, RankFailedError

__all__ = ["PeerWatch", "text_of"]

Result = TypeVar("Result")

_log = logging.getLogger("mpitrain")

_REVOKED = b"revoked "
_LEFT = b"left "
# How often news is looked for while nothing moves.
_INTERVAL_S = 0.02


class PeerWatch:
    """Sends and receives the news of one communicator.

    Args:
        transport: Of its ranks.
        settings: Of the communicator.
        calls: The operations of this rank.

    Attributes:
        revoked: Why it was given up; None if it was not.
        revoked_from: The first operation that cannot be completed because of that.
        leaving: Why this rank has left; "" if it has not.
    """

    def __init__(self, transport: Transport, settings: Settings, calls: Calls) -> None:
        self._transport = transport
        self._settings = settings
        self._calls = calls
        self._lock = threading.Lock()
        # One thread at a time reads news, so that they are taken in their order.
        self._reading = threading.Lock()
        self._subscribers: dict[bytes, Callable[[int, bytes], None]] = {}
        self.revoked: str | None = None
        self.revoked_from = 0
        self.leaving = ""
        self._left: dict[int, tuple[int, str]] = {}
        # The latest operation, for those who ask; and who is told, with its number and seconds, of one that stalls.
        self.latest = ""
        self.on_stall: Callable[[str, int, float], None] = _ignore
        self.leave_functions: Listeners[Callable[[str], None]] = Listeners()
        self.idle_functions: Listeners[Callable[[], None]] = Listeners()

    def revoke(self, reason: str, call_index: int = 0) -> None:
        """Give the communicator up, here and on all ranks, from this operation on."""
        if self._note_revoked(f"rank {self._transport.rank}: {reason}", call_index):
            self._tell_all(_REVOKED + f"{call_index} {reason}".encode())

    def give_up(self, reason: str, call_index: int) -> None:
        """Revoke because of an operation that has failed: it, and what else is in flight here, ends on all ranks.

        What this rank has completed before is not disturbed where others are still busy with it.
        """
        self.revoke(reason, min(call_index, self._calls.first_unfinished()))

    def attempt(self, function: Callable[[], Result], description: str, call_index: int) -> Result:
        """Call what this rank does by itself for an operation; if it fails, the operation fails on all ranks."""
        try:
            return function()
        except BaseException as error:
            self.give_up(f"{description}: {text_of(error)}", call_index)
            raise

    def leave(self, reason: str) -> None:
        """Tell all others that this rank takes part in no further operation; what is in flight here ends."""
        self.leaving = reason
        for function in self.leave_functions:
            function(reason)
        call_index = self._calls.first_unfinished()
        if call_index < self._calls.number:
            self._note_revoked(f"rank {self._transport.rank}: {reason}", call_index)
        self._tell_all(_LEFT + f"{call_index} {reason}".encode())

    def close(self, reason: str) -> None:
        """Refuse all operations of this rank, without a word to the others."""
        self._note_revoked(reason, 0)

    def _note_revoked(self, reason: str, call_index: int) -> bool:
        """Whether that ends operations which had not been given up before."""
        with self._lock:
            if self.revoked is not None and self.revoked_from <= call_index:
                return False
            self.revoked, self.revoked_from = self.revoked or reason, call_index
            return True

    def subscribe(self, topic: bytes, receive: Callable[[int, bytes], None]) -> None:
        """Have `receive(source, news)` called for the news of a topic, a word."""
        self._subscribers[topic] = receive

    def send(self, topic: bytes, dest: int, news: bytes) -> None:
        """Send news of a topic to a rank, which drops them if nobody there has subscribed to it."""
        self._transport.notify(dest, topic + b" " + news)

    def has_left(self, rank: int) -> bool:
        """Whether a rank is known to call no further operation."""
        return rank in self._left

    def _tell_all(self, news: bytes) -> None:
        for peer in range(self._transport.size):
            if peer != self._transport.rank:
                try:
                    self._transport.notify(peer, news)
                except CommError:
                    _log.debug("rank %d cannot be told %r", peer, news)

    def await_departures(self, limit_s: float) -> bool:
        """Whether all other ranks have left, or leave within so many seconds."""
        deadline_s = time.monotonic() + limit_s
        while True:
            self.read_news()
            if len(self._left) >= self._transport.size - 1:
                return True
            if time.monotonic() > deadline_s:
                return False
            time.sleep(_INTERVAL_S)

    def read_news(self) -> None:
        """Take what other ranks have said; any thread may call."""
        with self._reading:
            for source, news in self._transport.notices():
                self._take(source, news)

    def _take(self, source: int, news: bytes) -> None:
        if news.startswith((_REVOKED, _LEFT)):
            kind, call_index, reason = news.decode().split(" ", 2)
            if kind.encode() + b" " == _REVOKED:
                self._note_revoked(f"rank {source}: {reason}", int(call_index))
            else:
                with self._lock:
                    known = self._left.get(source)
                    # A rank may say so more than once; what it has given up it does not take up again.
                    if known is None or int(call_index) < known[0]:
                        self._left[source] = (int(call_index), reason)
            return
        topic, _, rest = news.partition(b" ")
        if receive := self._subscribers.get(topic):
            receive(source, rest)

    def check(self, call_index: int) -> None:
        """Refuse to go on with an operation if the communicator was given up before it.

        Raises:
            CommRevokedError: It was.
        """
        if self.revoked is not None and call_index >= self.revoked_from:
            raise CommRevokedError(
                f"rank {self._transport.rank}/{self._transport.size}: communicator was given up by "
                f"{self.revoked}; make a new one to go on"
            )

    def guard(self, task: Task[Result], description: str, call_index: int) -> Task[Result]:
        """Run a task, and raise instead of waiting for ever when news, or a time limit, say that it cannot end.

        Args:
            task: The operation.
            description: What messages call it.
            call_index: How many operations were called before it; the same on every rank.

        Raises:
            CommRevokedError, RankFailedError, CommTimeoutError: See `errors`.
        """
        self.latest = description
        try:
            idle_since_s = 0.0
            next_look_s = 0.0
            has_stalled = False
            while True:
                try:
                    moved = next(task)
                except StopIteration as stop:
                    return stop.value  # type: ignore[no-any-return]
                if moved:
                    idle_since_s = 0.0
                else:
                    now_s = time.monotonic()
                    if not idle_since_s:
                        idle_since_s = now_s
                        next_look_s = now_s + _INTERVAL_S
                    elif now_s >= next_look_s:
                        next_look_s = now_s + _INTERVAL_S
                        self._look(now_s - idle_since_s, description, call_index)
                        if not has_stalled and 0 < self._settings.stall_warning_s <= now_s - idle_since_s:
                            has_stalled = True
                            self.on_stall(description, call_index, now_s - idle_since_s)
                yield moved
        except (CommRevokedError, RankFailedError) as error:
            # Learned from others: what is in flight here besides may still be completed.
            task.close()
            self.revoke(f"{description}: {text_of(error)}", call_index)
            raise
        except BaseException as error:
            # Interrupted or dropped half way, the operation cannot be taken up again: the others must know as well.
            task.close()
            self.give_up(f"{description}: {text_of(error)}", call_index)
            raise

    def _look(self, idle_s: float, description: str, call_index: int) -> None:
        self.read_news()
        self.check(call_index)
        for function in self.idle_functions:
            function()
        who = f"rank {self._transport.rank}/{self._transport.size}, {description}"
        # Whoever left after this operation has done its part of it, even if that is still under way.
        with self._lock:
            missing = {rank: reason for rank, (first, reason) in self._left.items() if first <= call_index}
        if missing:
            reasons = "; ".join(f"rank {rank} {reason}" for rank, reason in sorted(missing.items()))
            raise RankFailedError(f"{who}: cannot complete without ranks that have left: {reasons}")
        if self._settings.timeout_s and idle_s > self._settings.timeout_s:
            raise CommTimeoutError(
                f"{who}: nothing moved for {idle_s:.1f} s, the limit is {self._settings.timeout_s:g} s; "
                "see which rank is late, or raise MPITRAIN_TIMEOUT_S"
            )


def _ignore(_description: str, _call_index: int, _waited_s: float) -> None:
    """Nobody wants to know."""


def text_of(error: BaseException) -> str:
    """Say what went wrong, in the words of the error."""
    if isinstance(error, GeneratorExit):
        return "given up before its end"
    return str(error) or type(error).__name__
