"""A timeline as a picture (SVG): one row per rank and lane, from a file that rank 0 wrote."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from xml.sax.saxutils import escape

from mpitrain.observe.trace_file import FORMAT

__all__ = ["draw_trace", "read_trace"]

# In pixels.
_WIDTH = 1100
_LEFT = 190
_TOP = 78
_ROW = 18
_GAP = 10

# Colours that those who do not tell red from green can tell apart; whatever else there is, is grey.
_COLOURS = {
    "backward": "#f0d9a8",
    "optimizer step": "#b9a7d3",
    "bucket fill": "#8a6d1f",
    "pack": "#8a6d1f",
    "unpack": "#b08d3a",
    "negotiation": "#9aa7b4",
    "agreement": "#9aa7b4",
    "wait": "#d9534f",
    "wait for peers": "#e8b4b2",
    "transfer": "#9fc5e8",
    "MPI": "#9fc5e8",
    "reduce": "#1f66b0",
}
_OTHER = "#d5dae0"


class _Row(NamedTuple):
    name: str
    rank: int
    lane: int


def read_trace(path: Path) -> dict[str, Any]:
    """Return the contents of a timeline file.

    Raises:
        OSError: It cannot be read.
        ValueError: It is not a timeline of mpitrain.
    """
    try:
        trace = json.loads(path.read_text(encoding="utf-8"))
        is_ours = trace["otherData"]["format"] == FORMAT
    except (KeyError, TypeError, ValueError):
        is_ours = False
    if not is_ours:
        raise ValueError(f"{path}: must be a timeline of mpitrain; write one with MPITRAIN_TIMELINE=FILE")
    return trace  # type: ignore[no-any-return]


def draw_trace(trace: dict[str, Any], begin_s: float = 0.0, end_s: float | None = None) -> str:
    """Return the SVG document.

    Args:
        trace: As read from the file.
        begin_s: Where the picture begins, in seconds of the timeline.
        end_s: Where it ends; None for the end of the timeline.

    Raises:
        ValueError: There is nothing between the two.
    """
    spans = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    end_us = 1e6 * (trace["otherData"]["duration_s"] if end_s is None else end_s)
    begin_us = 1e6 * begin_s
    shown = [event for event in spans if event["ts"] < end_us and event["ts"] + event["dur"] > begin_us]
    if not shown or end_us <= begin_us:
        raise ValueError(f"timeline: nothing between {begin_s:g} and {end_us / 1e6:g} s; choose another part")
    rows = list(_rows(trace, shown))
    position = {(row.rank, row.lane): index for index, row in enumerate(rows)}
    scale = (_WIDTH - _LEFT - 16) / (end_us - begin_us)
    body: list[str] = []
    for event in shown:
        left = max(event["ts"], begin_us)
        width = (min(event["ts"] + event["dur"], end_us) - left) * scale
        y = _row_y(position[event["pid"], event["tid"]], rows)
        body += _box(event, _LEFT + (left - begin_us) * scale, y, max(width, 0.4))
    height = _row_y(len(rows) - 1, rows) + _ROW + 16
    title = f"{trace['otherData']['ranks']} ranks, {(end_us - begin_us) / 1e3:.4g} ms"
    extent = f'width="{_WIDTH}" height="{height}"'
    view = f'viewBox="0 0 {_WIDTH} {height}" font-family="monospace" font-size="11"'
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" {extent} {view}>',
            f"<title>{escape(title)}</title>",
            f'<rect {extent} fill="#ffffff"/>',
            f'<text x="16" y="22" font-size="15" font-weight="bold">{escape(title)}</text>',
            *_legend({event["name"] for event in shown}),
            *_ticks(begin_us, end_us, height),
            *_labels(rows),
            *body,
            "</svg>\n",
        ]
    )


def _rows(trace: dict[str, Any], shown: Iterable[dict[str, Any]]) -> Iterator[_Row]:
    """Give the lanes in which something is shown, by rank."""
    names = {
        (event["pid"], event["tid"]): event["args"]["name"]
        for event in trace["traceEvents"]
        if event["name"] == "thread_name"
    }
    for rank, lane in sorted({(event["pid"], event["tid"]) for event in shown}):
        yield _Row(names[rank, lane].removeprefix("mpitrain "), rank, lane)


def _row_y(index: int, rows: Sequence[_Row]) -> int:
    return _TOP + index * _ROW + _GAP * rows[index].rank


def _ticks(begin_us: float, end_us: float, height: int) -> Iterator[str]:
    """Mark about eight round times, in milliseconds of the timeline."""
    rough_us = (end_us - begin_us) / 8
    step_us = 10.0 ** math.floor(math.log10(rough_us))
    step_us *= next(factor for factor in (1, 2, 5, 10) if factor * step_us >= rough_us)
    for number in range(math.ceil(begin_us / step_us), math.floor(end_us / step_us) + 1):
        x = _LEFT + (number * step_us - begin_us) * (_WIDTH - _LEFT - 16) / (end_us - begin_us)
        yield f'<line x1="{x:.1f}" y1="{_TOP}" x2="{x:.1f}" y2="{height - 14}" stroke="#e3e6ea"/>'
        label = f"{number * step_us / 1e3:g}"
        yield f'<text x="{x:.1f}" y="{height - 3}" text-anchor="middle" fill="#777777">{label}</text>'


def _labels(rows: Sequence[_Row]) -> Iterator[str]:
    for index, row in enumerate(rows):
        y = _row_y(index, rows)
        if index == 0 or rows[index - 1].rank != row.rank:
            yield f'<text x="16" y="{y + 13}" font-weight="bold">rank {row.rank}</text>'
        yield f'<text x="{_LEFT - 8}" y="{y + 13}" text-anchor="end">{escape(row.name)}</text>'
        yield f'<line x1="{_LEFT}" y1="{y + _ROW}" x2="{_WIDTH - 16}" y2="{y + _ROW}" stroke="#e3e6ea"/>'


def _box(event: dict[str, Any], x: float, y: int, width: float) -> Iterator[str]:
    details = event.get("args", {}).get("details", "")
    text = escape(f"{event['name']} {details}: {event['dur'] / 1e3:.3f} ms")
    # What lies in something else is lower, so that both are seen.
    inset = 4 if event["name"] in _COLOURS and event["name"] not in ("backward", "optimizer step", "wait") else 1
    colour = _COLOURS.get(event["name"], _OTHER)
    yield (
        f'<rect x="{x:.2f}" y="{y + inset}" width="{width:.2f}" height="{_ROW - 1 - inset}" fill="{colour}">'
        f"<title>{text}</title></rect>"
    )


def _legend(names: set[str]) -> Iterator[str]:
    x, y = 16, 36
    for name in [*(name for name in _COLOURS if name in names), "other"]:
        width = 14 + 7 * len(name) + 22
        if x + width > _WIDTH:
            x, y = 16, y + 16
        yield f'<rect x="{x}" y="{y}" width="11" height="11" fill="{_COLOURS.get(name, _OTHER)}"/>'
        yield f'<text x="{x + 16}" y="{y + 10}">{escape(name)}</text>'
        x += width
