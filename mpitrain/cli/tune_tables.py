"""What rank 0 shows of a tuning run: its progress, and the table that came of it."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import rich.box
import rich.console
import rich.progress
import rich.table

from mpitrain.bench.units import format_nbytes
from mpitrain.cli.tuning import Measurement
from mpitrain.collectives.table import Key, Steps

__all__ = ["progress", "table_of_choices", "table_of_times"]


def describe(key: Key) -> str:
    """Write how an operation is used."""
    return ("blocking" if key.blocking else "in background") + (", shared array" if key.in_window else "")


@contextlib.contextmanager
def progress(
    console: rich.console.Console, keys: Sequence[Key], items_per_key: int
) -> Iterator[Callable[[Key, int], None]]:
    """Show how far the measurements are: a bar on a terminal, else a line for each combination.

    Yields:
        A function that is told what is measured next.
    """
    began_s = time.monotonic()
    if not console.is_terminal:
        started: set[Key] = set()

        def write_line(key: Key, _nbytes: int) -> None:
            if key not in started:
                started.add(key)
                elapsed_s = time.monotonic() - began_s
                where = f"{len(started)}/{len(keys)} after {elapsed_s:.0f} s"
                console.print(f"{where}: {key.collective}, {describe(key)}", highlight=False)
                # Whoever follows the file sees it now.
                console.file.flush()

        yield write_line
        return
    with rich.progress.Progress(
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.TaskProgressColumn(),
        rich.progress.TimeElapsedColumn(),
        console=console,
        transient=True,
        # A thread that draws would take a core from the ranks.
        auto_refresh=False,
    ) as bar:
        task = bar.add_task("", total=len(keys) * items_per_key)

        def move_bar(key: Key, nbytes: int) -> None:
            text = f"{key.collective}, {describe(key)}, {format_nbytes(nbytes)}"
            bar.update(task, description=f"{text:45}", refresh=True)
            bar.advance(task)

        yield move_bar


def table_of_choices(
    title: str, measurements: dict[Key, list[Measurement]], choices: dict[Key, Steps]
) -> rich.table.Table:
    """Return the winners with their leads, by ranges of sizes."""
    table = rich.table.Table(title=title, box=rich.box.SIMPLE_HEAD, title_justify="left")
    for heading in ("collective", "use", "up to", "algorithm"):
        table.add_column(heading)
    table.add_column("faster than the next", justify="right")
    table.add_column("which is")
    for key, steps in choices.items():
        previous = -1
        for index, (limit, algorithm) in enumerate(steps):
            within = [
                each for each in measurements[key] if each.nbytes > previous and (limit is None or each.nbytes <= limit)
            ]
            previous = limit or previous
            lead, rival = _lead(algorithm, within)
            name, use = (key.collective, describe(key)) if index == 0 else ("", "")
            table.add_row(name, use, "any size" if limit is None else format_nbytes(limit), algorithm, lead, rival)
        table.add_section()
    return table


def _lead(algorithm: str, measurements: Sequence[Measurement]) -> tuple[str, str]:
    """Return by how much the algorithm leads, and over which one most often."""
    leads: list[float] = []
    rivals: Counter[str] = Counter()
    for each in measurements:
        others = {name: seconds for name, seconds in each.times_s.items() if name != algorithm}
        if others:
            rival = min(others, key=lambda name: others[name])
            rivals[rival] += 1
            leads.append(others[rival] / each.times_s[algorithm])
    if not leads:
        return "alone", ""
    low, high = f"{min(leads):.2f}", f"{max(leads):.2f}"
    return (f"{low} x" if low == high else f"{low} - {high} x"), rivals.most_common(1)[0][0]


def table_of_times(key: Key, measurements: Sequence[Measurement]) -> rich.table.Table:
    """Return every measured time of one combination, in microseconds."""
    title = f"{key.collective}, {describe(key)}: microseconds"
    table = rich.table.Table(title=title, box=rich.box.SIMPLE_HEAD, title_justify="left")
    names = list(measurements[0].times_s)
    for heading in ("size", *names):
        table.add_column(heading, justify="right")
    for each in measurements:
        cells = (f"{each.times_s[name] * 1e6:.0f}" if name in each.times_s else "-" for name in names)
        table.add_row(format_nbytes(each.nbytes), *cells)
    return table
