"""The plots of a report: small enough for a phone, with colours that everybody can tell apart, as SVG or PNG."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from mpitrain.bench.units import format_nbytes, format_s

__all__ = ["Curve", "Plot", "bar_plot", "size_plot"]

# Okabe and Ito's colours, without the yellow, which is too light for lines on white.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F3C8D", "#11A579")
_MARKERS = "os^Dv<>P"
# Algorithms that are often seen together look the same in all plots.
_USUAL = ("auto", "ring", "direct", "double_tree", "native", "halving_doubling", "hierarchical", "recursive_doubling")
_LIBRARY_COLOURS = ("#222222", "#777777", "#aaaaaa")
# Inches. Shown as wide as a phone, letters are about as high as those of the text.
_SIZE = (4.6, 3.3)
_LEGEND_LINE = 0.19
_LEGEND_COLUMNS = 2
_STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e6ea",
    "grid.linewidth": 0.7,
    "axes.edgecolor": "#8a8f98",
    "axes.axisbelow": True,
    "svg.fonttype": "none",
}


@dataclasses.dataclass(frozen=True)
class Curve:
    """One line of a plot.

    Attributes:
        label: In the legend.
        points: y by x.
        band: Lowest and highest y by x; empty for none.
        is_library: Drawn in grey, as what others are compared with.
        is_variant: Drawn dashed and with open marks: the label ends, after a comma, in what differs from the usual.
        is_model: Drawn dashed and without markers, in the colour of the curve of the same label.
    """

    label: str
    points: Mapping[int, float]
    band: Mapping[int, tuple[float, float]] = dataclasses.field(default_factory=dict)
    is_library: bool = False
    is_variant: bool = False
    is_model: bool = False


class Plot:
    """A figure that is drawn once and written in any format.

    Args:
        name: Part of file names.
        caption: What it shows, in one sentence.
        draw: Draws into the axes.
        legend_lines: Lines that the legend needs.
    """

    def __init__(self, name: str, caption: str, draw: Callable[[Axes], None], legend_lines: int = 0) -> None:
        self.name = name
        self.caption = caption
        self._draw = draw
        self._legend_lines = legend_lines

    def svg(self) -> str:
        """Return an SVG element for a page."""
        with self._figure() as figure:
            text = io.StringIO()
            figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
        # What comes before the element belongs to a file of its own.
        return text.getvalue()[text.getvalue().index("<svg") :]

    def save_png(self, path: Path) -> None:
        """Write a PNG file.

        Raises:
            OSError: It cannot be written.
        """
        with self._figure() as figure:
            figure.savefig(path, format="png", dpi=200)

    @contextmanager
    def _figure(self) -> Iterator[Figure]:
        # Numbers in an SVG depend on the salt only, so the same results make the same file.
        with mpl.rc_context({**_STYLE, "svg.hashsalt": self.name}):
            height = _SIZE[1] + self._legend_lines * _LEGEND_LINE
            figure = Figure(figsize=(_SIZE[0], height), layout="constrained")
            self._draw(figure.add_subplot())
            yield figure


def size_plot(
    name: str,
    caption: str,
    curves: Sequence[Curve],
    *,
    y_label: str,
    is_log: bool = False,
    is_time: bool = False,
    base: float | None = None,
    x_label: str = "",
) -> Plot:
    """Return a plot of curves over sizes in bytes, or over something else that `x_label` names.

    Args:
        name: Part of file names.
        caption: What it shows.
        curves: In the order of the legend.
        y_label: With the unit.
        is_log: Whether y is on a logarithmic scale.
        is_time: Whether y is in seconds.
        base: Where a line across marks what curves are compared with.
        x_label: What x is; sizes if not given.
    """

    def draw(axes: Axes) -> None:
        for curve, (colour, marker) in zip(curves, _looks(curves), strict=True):
            xs = sorted(curve.points)
            ys = [curve.points[x] for x in xs]
            if curve.is_model:
                axes.plot(xs, ys, color=colour, linestyle=(0, (4, 2)), linewidth=1.3)
                continue
            axes.plot(
                xs,
                ys,
                color=colour,
                marker=marker,
                markersize=4,
                linewidth=1.6,
                linestyle=":" if curve.is_library else "--" if curve.is_variant else "-",
                markerfacecolor="white" if curve.is_variant else colour,
                label=curve.label,
            )
            if curve.band:
                low, high = ([curve.band[x][end] for x in xs] for end in (0, 1))
                axes.fill_between(xs, low, high, color=colour, alpha=0.12, linewidth=0)
        if base is not None:
            axes.axhline(base, color="#8a8f98", linewidth=1)
        axes.set_ylabel(y_label)
        if is_log:
            axes.set_yscale("log")
            axes.yaxis.set_minor_formatter(NullFormatter())
            if not is_time:
                axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        else:
            axes.set_ylim(bottom=0)
        if is_time:
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: format_s(float(f"{value:.3g}"))))
        _scale_x(axes, curves, x_label)
        if any(axes.get_legend_handles_labels()):
            axes.legend(
                loc="upper center", bbox_to_anchor=(0.45, -0.16), ncols=_LEGEND_COLUMNS, frameon=False, fontsize=8.5
            )

    labels = {curve.label for curve in curves if not curve.is_model}
    return Plot(name, caption, draw, -(-len(labels) // _LEGEND_COLUMNS))


def _scale_x(axes: Axes, curves: Sequence[Curve], x_label: str) -> None:
    axes.set_xscale("log", base=2)
    axes.xaxis.set_minor_locator(NullLocator())
    if x_label:
        axes.set_xlabel(x_label)
        ticks = sorted({x for curve in curves for x in curve.points})
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        return
    axes.set_xlabel("size of the buffer")
    axes.xaxis.set_major_locator(LogLocator(base=2, numticks=7))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_nbytes(int(value)).replace("iB", "")))


def _looks(curves: Sequence[Curve]) -> Iterator[tuple[str, str]]:
    """Yield a colour and a marker for each curve; those of one algorithm are alike."""
    names = list(dict.fromkeys(_algorithm(curve) for curve in curves if not curve.is_library))
    # Those without a look of their own take what is free.
    free = [index for index, name in enumerate(_USUAL) if name not in names]
    libraries = list(dict.fromkeys(curve.label for curve in curves if curve.is_library))
    others = [name for name in names if name not in _USUAL]
    for curve in curves:
        name = _algorithm(curve)
        if curve.is_library:
            yield _LIBRARY_COLOURS[libraries.index(curve.label) % len(_LIBRARY_COLOURS)], "x"
            continue
        if name in _USUAL:
            index = _USUAL.index(name)
        else:
            index = (free or range(len(_COLOURS)))[others.index(name) % (len(free) or len(_COLOURS))]
        yield _COLOURS[index], _MARKERS[index]


def _algorithm(curve: Curve) -> str:
    """Return the label without the kind of memory."""
    return curve.label.partition(",")[0] if curve.is_variant else curve.label


def bar_plot(
    name: str, caption: str, bars: Mapping[str, Mapping[str, float]], *, y_label: str, base: float | None = None
) -> Plot:
    """Return groups of bars.

    Args:
        name: Part of file names.
        caption: What it shows.
        bars: Height by group and, within it, by label.
        y_label: With the unit.
        base: Where a line across marks what bars are compared with.
    """
    labels = list(dict.fromkeys(label for group in bars.values() for label in group))

    def draw(axes: Axes) -> None:
        width = 0.8 / len(labels)
        for index, label in enumerate(labels):
            places = [place for place, group in enumerate(bars.values()) if label in group]
            heights = [group[label] for group in bars.values() if label in group]
            offset = (index - (len(labels) - 1) / 2) * width
            drawn = axes.bar(
                [place + offset for place in places], heights, width * 0.92, label=label, color=_COLOURS[index]
            )
            axes.bar_label(drawn, fmt="%.3g", fontsize=7.5, padding=1, color="#444444")
        if base is not None:
            axes.axhline(base, color="#8a8f98", linewidth=1)
        axes.set_xticks(range(len(bars)), list(bars))
        axes.grid(visible=False, axis="x")
        axes.set_ylabel(y_label)
        axes.margins(y=0.12)
        axes.legend(loc="upper center", bbox_to_anchor=(0.45, -0.1), ncols=len(labels), frameon=False, fontsize=8.5)

    return Plot(name, caption, draw, 1)
