"""Counters of communication: how much, and for how long somebody has waited for it."""

from __future__ import annotations

import dataclasses
import time

__all__ = ["CommunicationClock", "CommunicationCounters"]


@dataclasses.dataclass(frozen=True, slots=True)
class CommunicationCounters:
    """What has been communicated up to a moment; the difference of two is what was in between.

    Attributes:
        operations: Collectives started; named operations that were fused are one.
        nbytes: Bytes of the arrays that this rank brought to them.
        exposed_s: Seconds for which a thread of the caller was held up: it started operations, or waited for one.
        hidden_s: Seconds for which operations were in flight while nobody waited, so that they cost the caller nothing
            but what the progress thread takes of the cores.
    """

    operations: int = 0
    nbytes: int = 0
    exposed_s: float = 0.0
    hidden_s: float = 0.0

    def __sub__(self, earlier: CommunicationCounters) -> CommunicationCounters:
        return CommunicationCounters(
            self.operations - earlier.operations,
            self.nbytes - earlier.nbytes,
            self.exposed_s - earlier.exposed_s,
            self.hidden_s - earlier.hidden_s,
        )


class CommunicationClock:
    """Tells seconds in which callers are held up from seconds in which operations are in flight by themselves.

    It is told when either begins or ends, by one thread at a time.
    """

    def __init__(self) -> None:
        self.exposed_s = 0.0
        self.hidden_s = 0.0
        self._callers = 0
        self._is_in_flight = False
        self._since_s = 0.0

    def note(self, *, callers: int = 0, is_in_flight: bool | None = None) -> None:
        """Book the time since the last change.

        Args:
            callers: 1 if a further thread is held up from now on, -1 if one no longer is.
            is_in_flight: Whether operations are in flight from now on; None if that does not change.
        """
        now_s = time.monotonic()
        if self._callers:
            self.exposed_s += now_s - self._since_s
        elif self._is_in_flight:
            self.hidden_s += now_s - self._since_s
        self._since_s = now_s
        self._callers += callers
        if is_in_flight is not None:
            self._is_in_flight = is_in_flight

    def book_blocking(self, elapsed_s: float) -> None:
        """Book a call that was driven to its end by its caller, and was not noted before."""
        self.exposed_s += elapsed_s
        if self._is_in_flight and not self._callers:
            # Nothing is hidden while somebody waits, for whatever.
            self.hidden_s -= elapsed_s
