"""A clock by hand, for what happens after a time."""

from __future__ import annotations

import time
from typing import Any

__all__ = ["Clock"]


class Clock:
    """Takes the place of the module `time` in a module under test: its monotonic clock stands still until it is let go.

    Attributes:
        now_s: What the clock shows.
    """

    def __init__(self) -> None:
        # Later than what the module under test may have noted by the real clock before.
        self.now_s = time.monotonic() + 1000.0
        self._end_s = 0.0
        self._step_s = 0.0

    def go(self, seconds: float) -> None:
        """Let so much time go by, a twentieth of it each time the clock is looked at."""
        # In this order: another thread may look at the clock in between.
        self._step_s = seconds / 20
        self._end_s = self.now_s + seconds

    def monotonic(self) -> float:
        """Return what it shows, as `time.monotonic` does."""
        if self.now_s < self._end_s:
            self.now_s += self._step_s
        return self.now_s

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)
