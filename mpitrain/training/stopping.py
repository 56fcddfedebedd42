"""Ends training on all ranks after the same step when somebody asks one of them to stop."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any, final

import numpy as np

from mpitrain.collectives import Communicator, Handle

__all__ = ["StopRequest"]

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


@final
class StopRequest:
    """Turns SIGTERM and SIGINT into a decision that all ranks take together.

        with StopRequest(comm) as stop:
            for step in range(num_steps):
                ...
                if stop.agreed_signal():
                    break  # and save a checkpoint

    The signal may come to some ranks only, and at different times. Only the first one is held back: it
    restores what was done before about signals, so that a second SIGINT interrupts at once.

    Args:
        comm: Whose ranks stop together. It is duplicated, so every rank must call.
    """

    def __init__(self, comm: Communicator) -> None:
        self._comm = comm.duplicate(comm.settings.replace(check=False, algorithm="auto"))
        self._handle: Handle[Any] | None = None
        self._previous: dict[int, Any] = {}
        self._received = 0

    def __enter__(self) -> StopRequest:
        self._previous = {number: signal.signal(number, self._on_signal) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._restore()
        if self._handle is not None and error is None:
            self._handle.wait()
            self._handle = None

    def agreed_signal(self) -> int:
        """Return on all ranks alike the number of a signal that came to one of them, or 0.

        Every rank must call, after each step. The answer is about the step before: what was asked then has
        arrived by now, and nobody waits for it.
        """
        if self._comm.size == 1:
            return self._received
        answer = 0 if self._handle is None else int(self._handle.wait()[0])
        asked = np.array([self._received], dtype=np.uint8)
        self._handle = self._comm.allreduce_async_(asked, op="max")
        return answer

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        self._received = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
