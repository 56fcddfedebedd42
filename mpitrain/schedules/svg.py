"""Lanes with arrows between them, as SVG.

Terms: a *lane* is the horizontal line of a rank, a *column* the vertical strip of a round. Within a
column arrows keep to the left part and labels to the right part, so that they never
overlap; a lane is as high as the most labels in one of its cells need.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple
from xml.sax.saxutils import escape

from mpitrain.schedules.rounds import Receive

__all__ = ["Lanes", "render"]

# In pixels. A character of the label font is 0.6 em wide.
_LABEL_HEIGHT = 14
_CHARACTER = 7
_LEFT = 124
_TOP = 96
_ARROWS = 84  # width of the part of a column that has the arrows
_GAP = 8

# Two colours that those who do not tell red from green can tell apart.
_COLOURS = {"reduce": "#c8501e", "replace": "#1f66b0", "signal": "#555555"}
_MEANINGS = {
    "reduce": "reduced into the local chunks",
    "replace": "replaces the local chunks",
    "signal": "a signal, no data",
}


class Lanes(NamedTuple):
    """What the picture shows: per round and lane, the messages that arrive."""

    title: str
    names: Sequence[str]
    rounds: Sequence[Sequence[tuple[Receive, ...]]]


class _Layout(NamedTuple):
    lane_height: int
    column_width: int
    width: int
    height: int

    def lane_y(self, lane: int) -> int:
        return _TOP + lane * self.lane_height + self.lane_height // 2

    def column_x(self, column: int) -> int:
        return _LEFT + column * self.column_width


def render(lanes: Lanes) -> str:
    """Return the SVG document."""
    layout = _layout_of(lanes)
    body = [
        *_heading(lanes),
        *_grid(lanes, layout),
        *(
            line
            for column, arrivals in enumerate(lanes.rounds)
            for lane, receives in enumerate(arrivals)
            for line in _arrivals(receives, column, lane, layout)
        ),
    ]
    markers = [
        f'<marker id="head-{kind}" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7" markerHeight="7" '
        f'orient="auto"><path d="M0,0 L8,4 L0,8 z" fill="{colour}"/></marker>'
        for kind, colour in _COLOURS.items()
    ]
    extent = f'width="{layout.width}" height="{layout.height}"'
    view = f'viewBox="0 0 {layout.width} {layout.height}" font-family="monospace" font-size="11"'
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" {extent} {view}>',
            f"<title>{escape(lanes.title)}</title>",
            f"<defs>{''.join(markers)}</defs>",
            f'<rect {extent} fill="#ffffff"/>',
            *body,
            "</svg>\n",
        ]
    )


def _layout_of(lanes: Lanes) -> _Layout:
    cells = [receives for arrivals in lanes.rounds for receives in arrivals]
    most_labels = max((len(receives) for receives in cells), default=0)
    longest = max((len(_label(receive)) for receives in cells for receive in receives), default=0)
    lane_height = max(30, _LABEL_HEIGHT * most_labels + 10)
    column_width = _ARROWS + longest * _CHARACTER + 2 * _GAP
    # The title and the legend, each on one line, need their width too.
    legend_width = sum(_legend_width(kind) for kind in _COLOURS)
    text_width = max(len(lanes.title) * 9, legend_width) + 2 * 16
    return _Layout(
        lane_height=lane_height,
        column_width=column_width,
        width=max(_LEFT + len(lanes.rounds) * column_width + _GAP, text_width),
        height=_TOP + len(lanes.names) * lane_height + 16,
    )


def _legend_width(kind: str) -> int:
    return 40 + len(_MEANINGS[kind]) * _CHARACTER + 24


def _heading(lanes: Lanes) -> Iterator[str]:
    yield f'<text x="16" y="26" font-size="15" font-weight="bold">{escape(lanes.title)}</text>'
    x = 16
    for kind, meaning in _MEANINGS.items():
        yield _arrow(x, 50, x + 32, 50, kind)
        yield f'<text x="{x + 40}" y="54">{meaning}</text>'
        x += _legend_width(kind)


def _grid(lanes: Lanes, layout: _Layout) -> Iterator[str]:
    bottom = layout.height - 16
    for column in range(len(lanes.rounds)):
        x = layout.column_x(column)
        if column % 2 == 0:
            extent = f'width="{layout.column_width}" height="{bottom - _TOP}"'
            yield f'<rect x="{x}" y="{_TOP}" {extent} fill="#f3f4f6"/>'
        middle = x + layout.column_width // 2
        yield f'<text x="{middle}" y="{_TOP - 10}" text-anchor="middle">round {column}</text>'
    end = layout.column_x(len(lanes.rounds))
    for lane, name in enumerate(lanes.names):
        y = layout.lane_y(lane)
        yield f'<text x="16" y="{y + 4}">{escape(name)}</text>'
        yield f'<line x1="{_LEFT}" y1="{y}" x2="{end}" y2="{y}" stroke="#c4c8ce"/>'


def _arrivals(receives: Sequence[Receive], column: int, lane: int, layout: _Layout) -> Iterator[str]:
    x, y = layout.column_x(column), layout.lane_y(lane)
    # Labels are stacked around the lane, in the order in which the messages are listed.
    first_baseline = y + 4 - (len(receives) - 1) * _LABEL_HEIGHT // 2
    label_x = x + _GAP + _ARROWS
    for index, receive in enumerate(receives):
        kind = _kind(receive)
        yield _arrow(x + _GAP, layout.lane_y(receive.peer), x + _ARROWS, y, kind)
        label = _label(receive)
        baseline = first_baseline + index * _LABEL_HEIGHT
        # The box behind a label keeps the line of the lane out of the letters.
        yield (
            f'<rect x="{label_x - 3}" y="{baseline - 11}" width="{len(label) * _CHARACTER + 6}" '
            f'height="{_LABEL_HEIGHT}" rx="3" fill="#ffffff"/>'
        )
        yield f'<text x="{label_x}" y="{baseline}" fill="{_COLOURS[kind]}">{label}</text>'


def _arrow(x1: int, y1: int, x2: int, y2: int, kind: str) -> str:
    dashes = ' stroke-dasharray="4 3"' if kind == "signal" else ""
    return (
        f'<line class="{kind}" x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="{_COLOURS[kind]}" '
        f'stroke-width="1.4"{dashes} marker-end="url(#head-{kind})"/>'
    )


def _kind(receive: Receive) -> str:
    if receive.start == receive.stop:
        return "signal"
    return "reduce" if receive.reduce else "replace"


def _label(receive: Receive) -> str:
    if receive.start == receive.stop:
        return f"from {receive.peer}"
    sign = "+" if receive.reduce else ""
    return f"{sign}[{receive.start}:{receive.stop}] from {receive.peer}"
