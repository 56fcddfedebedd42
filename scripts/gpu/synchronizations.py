"""Counts what waits for a device in spans of time, from what a profiler has recorded. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

__all__ = ["DEVICE_WIDE", "Span", "count_waits"]

DEVICE_WIDE = "cudaDeviceSynchronize"
# Calls of the runtime and of the driver, by the names that profilers give them.
_WAITS = (
    DEVICE_WIDE,
    "cuCtxSynchronize",
    "cudaStreamSynchronize",
    "cuStreamSynchronize",
    "cudaEventSynchronize",
    "cuEventSynchronize",
)


class Span(NamedTuple):
    """Something that took some time; begin and end by one clock."""

    name: str
    begin: float
    end: float


def count_waits(events: Iterable[Span], steps: Sequence[Span]) -> dict[str, int]:
    """Return how often each call that waits was made within the steps; those of the whole device are always listed."""
    counts = Counter(
        event.name
        for event in events
        if event.name in _WAITS and any(step.begin <= event.begin and event.end <= step.end for step in steps)
    )
    device_wide = counts.pop(DEVICE_WIDE, 0) + counts.pop("cuCtxSynchronize", 0)
    return {DEVICE_WIDE: device_wide, **dict(sorted(counts.items()))}
