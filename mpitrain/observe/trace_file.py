"""The file of a timeline: the events of all ranks in the trace format of Chrome, which Perfetto reads, too.

Processes of the picture are ranks, and their threads are lanes. Times are microseconds by the clock of rank 0.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mpitrain.observe.clocks import ClockMap
from mpitrain.observe.recorder import Event

__all__ = ["FORMAT", "Part", "write_trace"]

FORMAT = "mpitrain timeline 1"


@dataclasses.dataclass(frozen=True)
class Part:
    """What one rank recorded.

    Attributes:
        host: Name of its host.
        pid: Its process.
        events: In the order in which they ended.
        dropped: How many more there were, before those.
        lane_names: Names of the lanes.
        clocks: To rank 0's clock.
    """

    host: str
    pid: int
    events: list[Event]
    dropped: int
    lane_names: dict[int, str]
    clocks: ClockMap


def write_trace(path: Path, size: int, parts: Mapping[int, Part], begin_ns: int, end_ns: int) -> None:
    """Write the file, whole or not at all.

    Args:
        path: Replaced if it exists.
        size: Number of ranks.
        parts: By rank; of some ranks there may be none.
        begin_ns: Beginning of the timeline by rank 0's clock; what lies before is cut off.
        end_ns: Its end, likewise.

    Raises:
        OSError: It cannot be written.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write('{"displayTimeUnit": "ms",\n"otherData": ')
            json.dump(_facts(size, parts, begin_ns, end_ns), file)
            file.write(',\n"traceEvents": [\n')
            for index, event in enumerate(_events(size, parts, begin_ns, end_ns)):
                file.write(",\n" if index else "")
                json.dump(event, file, separators=(",", ":"))
            file.write("\n]}\n")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _facts(size: int, parts: Mapping[int, Part], begin_ns: int, end_ns: int) -> dict[str, Any]:
    errors = [part.clocks.error_ns for part in parts.values()]
    unknown = not errors or any(error is None for error in errors)
    return {
        "format": FORMAT,
        "ranks": size,
        "missing_ranks": [rank for rank in range(size) if rank not in parts],
        "duration_s": (end_ns - begin_ns) / 1e9,
        # A time of one rank is off from rank 0's by at most so much; null if a clock could not be compared.
        "clock_error_us": None if unknown else max(error for error in errors if error is not None) / 1e3,
        "processes": [_facts_of(rank, part) for rank, part in sorted(parts.items())],
    }


def _facts_of(rank: int, part: Part) -> dict[str, Any]:
    clocks, drift = part.clocks, part.clocks.drift
    origin = clocks.first or clocks.last
    return {
        "rank": rank,
        "host": part.host,
        "pid": part.pid,
        "events": len(part.events),
        "dropped_events": part.dropped,
        "clock_offset_us": None if origin is None else origin.offset_ns / 1e3,
        "clock_drift_ppm": None if drift is None else drift * 1e6,
        "clock_error_us": None if clocks.error_ns is None else clocks.error_ns / 1e3,
    }


def _events(size: int, parts: Mapping[int, Part], begin_ns: int, end_ns: int) -> Iterator[dict[str, Any]]:
    for rank, part in sorted(parts.items()):
        yield _metadata(rank, "process_name", name=f"rank {rank}/{size} on {part.host}")
        yield _metadata(rank, "process_sort_index", sort_index=rank)
        for lane, name in sorted(part.lane_names.items()):
            yield _metadata(rank, "thread_name", lane, name=name)
            yield _metadata(rank, "thread_sort_index", lane, sort_index=lane)
        aligned = [
            event._replace(
                begin_ns=part.clocks.to_reference_ns(event.begin_ns), end_ns=part.clocks.to_reference_ns(event.end_ns)
            )
            for event in part.events
        ]
        within = [event for event in aligned if event.end_ns >= begin_ns and event.begin_ns <= end_ns]
        # Outer spans before those that they contain.
        within.sort(key=lambda event: (event.lane, event.begin_ns, -event.end_ns))
        for event in within:
            yield _event(rank, event, max(event.begin_ns, begin_ns) - begin_ns, min(event.end_ns, end_ns) - begin_ns)


def _metadata(rank: int, kind: str, lane: int = 0, **arguments: Any) -> dict[str, Any]:
    return {"ph": "M", "pid": rank, "tid": lane, "name": kind, "args": arguments}


def _event(rank: int, event: Event, begin_ns: int, end_ns: int) -> dict[str, Any]:
    made: dict[str, Any] = {"pid": rank, "tid": event.lane, "name": event.name, "ts": begin_ns / 1e3}
    if event.begin_ns == event.end_ns:
        made |= {"ph": "i", "s": "t"}
    else:
        made |= {"ph": "X", "dur": (end_ns - begin_ns) / 1e3}
    if event.details:
        made["args"] = {"details": event.details}
    return made
