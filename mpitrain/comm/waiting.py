"""How a thread waits for messages: polling at first, then giving the core away.

A thread that keeps polling answers soonest but takes a core from whoever computes. So a waiter polls without pause
only where the node has a core to spare for it; elsewhere it yields, then sleeps for growing periods.
"""

from __future__ import annotations

import os
import time

__all__ = ["Backoff"]

_YIELDS = 20
_SHORTEST_SLEEP_S = 20e-6
_LONGEST_SLEEP_S = 500e-6
_SPIN_S = 0.05


class Backoff:
    """One wait: `pause()` after each fruitless poll, `reset()` when something moved."""

    def __init__(self, *, spin: bool) -> None:
        self._spin = spin
        self.reset()

    def reset(self) -> None:
        """Begin anew, with polling."""
        self._fruitless = 0
        self._sleep_s = _SHORTEST_SLEEP_S
        self._began_s = 0.0

    def pause(self) -> None:
        """Wait a little, the longer the more polls have been fruitless."""
        self._fruitless += 1
        if self._spin:
            # Whoever waits for this thread's core, although there should be one for each, gets it at once; alone on the
            # core it takes less time than a poll. And nobody gains from polling at full speed for long.
            os.sched_yield()
            if self._fruitless % 256:
                return
            now = time.monotonic()
            self._began_s = self._began_s or now
            if now - self._began_s < _SPIN_S:
                return
        elif self._fruitless <= _YIELDS:
            os.sched_yield()
            return
        time.sleep(self._sleep_s)
        self._sleep_s = min(2 * self._sleep_s, _LONGEST_SLEEP_S)
