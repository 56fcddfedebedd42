"""What the progress thread does a few times per second, whatever the threads of the caller do."""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Callable

from mpitrain.collectives.listeners import Listeners

__all__ = ["Services"]

_log = logging.getLogger("mpitrain")

# How often services are called, and those that ask for it; without any the thread wakes only for new work.
_INTERVAL_S = 0.25
_URGENT_INTERVAL_S = 100e-6
_LONGEST_SLEEP_S = 1.0


class Services:
    """Bound methods, held weakly. None may block; one that returns True wants to be called again at once."""

    def __init__(self) -> None:
        self._listeners: Listeners[Callable[[], object]] = Listeners()
        self._next_s = 0.0

    def add(self, service: Callable[[], object]) -> None:
        """Add one."""
        self._listeners.append(weakref.WeakMethod(service))

    def call(self) -> None:
        """Call all, if it is time; for one thread."""
        now_s = time.monotonic()
        if now_s < self._next_s:
            return
        is_urgent = False
        for service in self._listeners:
            try:
                is_urgent |= bool(service())
            except Exception as error:  # noqa: BLE001  (operations go on, and whoever needs the service has a limit)
                _log.debug("a service of the progress thread failed: %s", error)
        self._next_s = now_s + (_URGENT_INTERVAL_S if is_urgent else _INTERVAL_S)

    @property
    def idle_s(self) -> float:
        """For how long the thread may sleep if it has nothing else to do."""
        if not len(self._listeners):
            return _LONGEST_SLEEP_S
        return max(0.0, self._next_s - time.monotonic())
