"""What one process's clock shows when another's shows this: estimated from messages that go there and back.

Of several exchanges the fastest counts: the other clock was read between its departure and its arrival, so the error is
at most half the time that it took (D. Mills, RFC 5905). Clocks drift: an estimate at the beginning and one at the end
say by how much, and times in between are corrected accordingly.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

__all__ = ["SAME_CLOCK", "ClockMap", "Exchange", "Offset", "estimate_offset"]


class Exchange(NamedTuple):
    """One message there and back: when it left and came back, here, and what the other clock showed in between."""

    sent_ns: int
    reference_ns: int
    received_ns: int


class Offset(NamedTuple):
    """How far the reference clock is ahead of the local one.

    Attributes:
        at_ns: When, by the local clock.
        offset_ns: Reference minus local.
        error_ns: Bound of the offset's error.
    """

    at_ns: int
    offset_ns: int
    error_ns: int


SAME_CLOCK = Offset(0, 0, 0)
"""For processes of one node, which read the same monotonic clock."""


def estimate_offset(exchanges: Iterable[Exchange]) -> Offset | None:
    """Return the offset that the fastest exchange shows; None without any."""
    best = min(exchanges, key=lambda each: each.received_ns - each.sent_ns, default=None)
    if best is None:
        return None
    middle_ns = (best.sent_ns + best.received_ns) // 2
    # Rounded up: the bound must hold.
    return Offset(middle_ns, best.reference_ns - middle_ns, (best.received_ns - best.sent_ns + 1) // 2 + 1)


class ClockMap(NamedTuple):
    """Turns local times into times of the reference clock.

    Attributes:
        first: Offset at the beginning; None if none was measured.
        last: Offset at the end, likewise.
    """

    first: Offset | None
    last: Offset | None

    @property
    def is_aligned(self) -> bool:
        """Whether any offset was measured."""
        return self.first is not None or self.last is not None

    @property
    def drift(self) -> float | None:
        """Seconds that the reference gains per second; None where there is only one offset."""
        if self.first is None or self.last is None:
            return None
        elapsed_ns = self.last.at_ns - self.first.at_ns
        return (self.last.offset_ns - self.first.offset_ns) / elapsed_ns if elapsed_ns > 0 else 0.0

    @property
    def error_ns(self) -> int | None:
        """Bound of the error of times between the two offsets, if the drift was even; None if nothing was measured."""
        known = [offset.error_ns for offset in (self.first, self.last) if offset is not None]
        return max(known, default=None)

    def to_reference_ns(self, local_ns: int) -> int:
        """Return what the reference clock showed at a local time."""
        origin = self.first or self.last
        if origin is None:
            return local_ns
        return local_ns + origin.offset_ns + round((self.drift or 0.0) * (local_ns - origin.at_ns))
