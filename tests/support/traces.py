"""What every timeline file must fulfil."""

from __future__ import annotations

import collections
import json
from pathlib import Path
from typing import Any

# Times of the file are rounded to nanoseconds, in microseconds.
ROUNDING_US = 0.0011


def checked_trace(path: Path) -> dict[str, Any]:
    """Return the contents, after a check of the format: names, order within lanes, and nesting."""
    trace = json.loads(path.read_text(encoding="utf-8"))
    facts = trace["otherData"]
    ranks = {process["rank"] for process in facts["processes"]}
    assert ranks | set(facts["missing_ranks"]) == set(range(facts["ranks"]))
    lanes: dict[tuple[int, int], list[dict[str, Any]]] = collections.defaultdict(list)
    names = {(event["pid"], event["tid"]) for event in trace["traceEvents"] if event["name"] == "thread_name"}
    named_processes = {event["pid"] for event in trace["traceEvents"] if event["name"] == "process_name"}
    assert named_processes == ranks
    for event in trace["traceEvents"]:
        assert event["pid"] in ranks
        assert event["name"]
        if event["ph"] != "M":
            assert event["ph"] in ("X", "i")
            assert (event["pid"], event["tid"]) in names
            lanes[event["pid"], event["tid"]].append(event)
    for events in lanes.values():
        begins = [event["ts"] for event in events]
        assert begins == sorted(begins)
        assert begins[0] >= 0
        open_ends: list[float] = []
        for event in events:
            end = event["ts"] + event.get("dur", 0)
            while open_ends and open_ends[-1] <= event["ts"] + ROUNDING_US:
                open_ends.pop()
            # Within the innermost span that is still open.
            assert not open_ends or end <= open_ends[-1] + ROUNDING_US
            open_ends.append(end)
    return trace


def names_of(trace: dict[str, Any], rank: int) -> collections.Counter[str]:
    """Count the events of a rank by name."""
    return collections.Counter(
        event["name"] for event in trace["traceEvents"] if event["ph"] != "M" and event["pid"] == rank
    )
