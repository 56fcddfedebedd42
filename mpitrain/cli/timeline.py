"""The command `mpitrain timeline`."""

from __future__ import annotations

import collections
from pathlib import Path
from typing import Any

import click
import rich.box
import rich.table

from mpitrain.cli.console import make_console
from mpitrain.collectives.table_file import store_text
from mpitrain.observe.picture import draw_trace, read_trace

__all__ = ["timeline"]


@click.command()
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--svg", "svg_path", type=click.Path(dir_okay=False, path_type=Path), help="Draw it in this file.")
@click.option(
    "--begin", "begin_s", type=click.FloatRange(min=0), default=0.0, help="Where the picture begins: seconds."
)
@click.option("--end", "end_s", type=click.FloatRange(min=0), help="Where it ends.")
def timeline(*, file: Path, svg_path: Path | None, begin_s: float, end_s: float | None) -> None:
    """Show what ranks spent their time with, from a FILE that MPITRAIN_TIMELINE or start_timeline() had written.

    To look at all of it, open the file at https://ui.perfetto.dev. Starts no MPI.
    """
    console = make_console()
    try:
        trace = read_trace(file)
    except OSError as error:
        raise ValueError(f"timeline: cannot be read, got {error}; name a file that a job has written") from None
    console.print(_table_of_times(trace))
    if svg_path is not None:
        picture = draw_trace(trace, begin_s, end_s)
        try:
            store_text(picture, svg_path)
        except OSError as error:
            raise ValueError(f"picture: cannot be stored, got {error}; name another file with --svg") from None
        console.print(f"drawn in {svg_path}", soft_wrap=True, highlight=False)
        first_s = _first_pass_s(trace)
        if not begin_s and first_s > trace["otherData"]["duration_s"] / 4:
            hint = f"the first backward pass begins at {first_s:.2f} s: draw from there with --begin {first_s:.2f}"
            console.print(hint, soft_wrap=True, highlight=False)


def _first_pass_s(trace: dict[str, Any]) -> float:
    """Return when a backward pass begins for the first time; 0 if there is none."""
    begins_us = [event["ts"] for event in trace["traceEvents"] if event["name"] == "backward" and event["ph"] == "X"]
    return min(begins_us, default=0.0) / 1e6


def _table_of_times(trace: dict[str, Any]) -> rich.table.Table:
    """Return the milliseconds of each rank by kind of span; spans within others count for both."""
    facts = trace["otherData"]
    error_us = facts["clock_error_us"]
    clocks = "unknown" if error_us is None else f"{error_us:.0f} us"
    title = f"{facts['ranks']} ranks, {facts['duration_s']:.3f} s, clocks agree to {clocks}; milliseconds"
    table = rich.table.Table(title=title, box=rich.box.SIMPLE_HEAD, title_justify="left")
    times_ms: dict[str, collections.Counter[int]] = collections.defaultdict(collections.Counter)
    for event in trace["traceEvents"]:
        if event["ph"] == "X":
            times_ms[event["name"]][event["pid"]] += event["dur"] / 1e3
    ranks = [process["rank"] for process in facts["processes"]]
    table.add_column("span")
    for rank in ranks:
        table.add_column(f"rank {rank}", justify="right")
    for name, by_rank in sorted(times_ms.items(), key=lambda item: -max(item[1].values())):
        table.add_row(name, *(f"{by_rank[rank]:.1f}" if by_rank[rank] else "-" for rank in ranks))
    return table
