"""How fast training goes, and how much of its time is spent waiting for other ranks."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

__all__ = ["Meter"]


def _never() -> float:
    return 0.0


class Meter:
    """Adds up time, samples and waiting of what happens under `measure`.

    Args:
        waiting_s: Returns the seconds for which communication has held up this process so far: `exposed_s` of
            `mpitrain.torch.communication_counters()`.
        clock_s: Returns seconds, from any origin.

    Attributes:
        samples: Measured so far.
        elapsed_s: Seconds measured so far.
        communication_s: Those of them that passed in waiting for communication. What goes on in the
            background while this process computes is not in it.
    """

    def __init__(
        self, waiting_s: Callable[[], float] = _never, clock_s: Callable[[], float] = time.perf_counter
    ) -> None:
        self._waiting_s = waiting_s
        self._clock_s = clock_s
        self.samples = 0
        self.elapsed_s = 0.0
        self.communication_s = 0.0

    @contextlib.contextmanager
    def measure(self, samples: int) -> Iterator[None]:
        """Measure work on so many samples; it is not counted if it raises."""
        waiting_s, began_s = self._waiting_s(), self._clock_s()
        yield
        self.elapsed_s += self._clock_s() - began_s
        self.communication_s += self._waiting_s() - waiting_s
        self.samples += samples

    @property
    def samples_per_s(self) -> float:
        """Samples per second; 0 before anything was measured."""
        return self.samples / self.elapsed_s if self.elapsed_s else 0.0

    @property
    def communication_share(self) -> float:
        """Part of the time that passed in waiting for communication, from 0 to 1."""
        return self.communication_s / self.elapsed_s if self.elapsed_s else 0.0
