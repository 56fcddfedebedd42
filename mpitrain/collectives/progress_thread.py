"""The thread of a process that advances what nobody waits for, and calls services now and then.

There is none before the first work for it. It sleeps when there is nothing to do, and ends with its engine.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Protocol

from mpitrain.collectives.services import Services
from mpitrain.comm import Backoff

__all__ = ["Engine", "ProgressThread"]


class Engine(Protocol):
    """What has operations in flight."""

    @property
    def spin_background(self) -> bool:
        """Whether the thread may keep polling."""

    def has_background_work(self) -> bool:
        """Whether operations are in flight that no waiting thread advances."""

    def advance_all(self) -> bool:
        """Move on all operations in flight; whether any of them moved."""


class ProgressThread:
    """At most one thread, whose name is "mpitrain progress".

    Args:
        engine: Held weakly, but while the thread works, so that it can be collected.

    Attributes:
        changed: To be held by who gives the thread work, and wakes it.
        is_closed: Whether it has ended for good.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = weakref.ref(engine)
        self._services = Services()
        self._thread: threading.Thread | None = None
        self.changed = threading.Condition()
        self.is_closed = False

    @property
    def is_current(self) -> bool:
        """Whether it is this thread that calls."""
        return threading.current_thread() is self._thread

    def wake(self) -> None:
        """Have it look for work; with `changed` held."""
        if self._thread is None and not self.is_closed:
            self._thread = threading.Thread(target=self._run, name="mpitrain progress", daemon=True)
            self._thread.start()
        self.changed.notify_all()

    def serve_regularly(self, service: Callable[[], object]) -> None:
        """Call it a few times per second, whatever the caller does; see `Services`."""
        with self.changed:
            self._services.add(service)
            self.wake()

    def close(self) -> None:
        """End it, and wait for that."""
        with self.changed:
            self.is_closed = True
            self.changed.notify_all()
            thread, self._thread = self._thread, None
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def _run(self) -> None:
        backoff: Backoff | None = None
        while not self.is_closed and (engine := self._engine()) is not None:
            self._services.call()
            if engine.has_background_work():
                backoff = backoff or Backoff(spin=engine.spin_background)
                if engine.advance_all():
                    backoff.reset()
                else:
                    backoff.pause()
            else:
                backoff = None
                idle_s = self._services.idle_s
                with self.changed:
                    if engine.has_background_work() or self.is_closed:
                        continue
                    del engine
                    # Woken by new work; the time limit is also for engines that nobody refers to any more.
                    self.changed.wait(idle_s)
