"""The command `mpitrain explain`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click
import rich.box
import rich.console
import rich.table

from mpitrain.bench.measure import sizes_between
from mpitrain.bench.model import Cluster, time_s
from mpitrain.bench.units import format_nbytes
from mpitrain.cli.console import make_console
from mpitrain.collectives.table import Shape
from mpitrain.collectives.table_file import store_text
from mpitrain.schedules import ALGORITHMS, Algorithm, draw_svg, find_algorithm
from mpitrain.schedules.draw import describe_round

__all__ = ["explain"]

# A picture or a table of more ranks is not read by anybody.
_MOST_RANKS = 64
# Powers of two suit some algorithms best.
_NUM_NODES = (4, 12, 100, 1024)
_LEAST_NBYTES, _MOST_NBYTES = 8, 1 << 30


@click.command()
@click.argument("collective", type=click.Choice(list(ALGORITHMS)))
@click.argument("name", metavar="ALGORITHM", default="")
@click.option("--size", type=click.IntRange(1, _MOST_RANKS), default=4, show_default=True, help="Number of ranks.")
@click.option("--root", type=click.IntRange(min=0), default=0, show_default=True, help="Where there is one.")
@click.option("--segments", type=click.IntRange(min=1), default=2, show_default=True, help="Where there are any.")
@click.option(
    "--svg", "svg_path", type=click.Path(dir_okay=False, path_type=Path), help="Draw the rounds in this file."
)
def explain(*, collective: str, name: str, size: int, root: int, segments: int, svg_path: Path | None) -> None:
    """Show the rounds of an algorithm, what it costs, when it wins and where it comes from.

    Without the name of an algorithm it lists those of the collective. Starts no MPI.
    """
    console = make_console()
    if not name:
        console.print(_table_of_algorithms(collective))
        return
    algorithm = find_algorithm(collective, name)
    if svg_path is not None:
        picture = draw_svg(algorithm, size, root=root, num_segments=segments)
        try:
            store_text(picture, svg_path)
        except OSError as error:
            raise ValueError(f"picture: cannot be stored, got {error}; name another file with --svg") from None
    for table in _tables_of_rounds(algorithm, size, root, segments, console.width):
        console.print(table)
    console.print(_table_of_facts(algorithm, size, segments))
    if svg_path is not None:
        console.print(f"drawn in {svg_path}", soft_wrap=True, highlight=False)


def _table_of_algorithms(collective: str) -> rich.table.Table:
    table = rich.table.Table(title=f"Algorithms of {collective}", box=rich.box.SIMPLE_HEAD, title_justify="left")
    for heading in ("algorithm", "rounds", "bytes sent / n", "source"):
        table.add_column(heading)
    for algorithm in ALGORITHMS[collective].values():
        table.add_row(algorithm.name, algorithm.rounds_formula, algorithm.volume_formula, algorithm.source)
    return table


def _tables_of_rounds(
    algorithm: Algorithm, size: int, root: int, num_segments: int, width: int
) -> Iterator[rich.table.Table]:
    """Yield a row per round and a column per rank, as many side by side as there is room for."""
    columns = [
        [describe_round(each) for each in algorithm.rounds_of(rank, size, root=root, num_segments=num_segments)]
        for rank in range(size)
    ]
    longest = max((len(line) for column in columns for cell in column for line in cell), default=0)
    at_once = max(1, (width - 10) // (max(longest, 7) + 3))
    for begin in range(0, size, at_once):
        ranks = range(begin, min(begin + at_once, size))
        title = f"Rounds of {algorithm.qualified_name}, {size} ranks" if begin == 0 else None
        table = rich.table.Table(title=title, box=rich.box.SIMPLE_HEAD, title_justify="left", show_lines=False)
        table.add_column("round", justify="right", no_wrap=True)
        for rank in ranks:
            table.add_column(f"rank {rank}", no_wrap=True)
        for index in range(len(columns[0])):
            table.add_row(str(index), *("\n".join(columns[rank][index]) for rank in ranks), end_section=True)
        yield table


def _table_of_facts(algorithm: Algorithm, size: int, num_segments: int) -> rich.table.Table:
    table = rich.table.Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    table.add_row(
        "read as", "->3 \\[0:2] sends chunks 0 and 1 to rank 3; <-1 \\[2:4] receives chunks from rank 1 in place"
    )
    table.add_row("", "of its own; <-1 +\\[2:4] reduces them into its own")
    table.add_row("ranks p", f"{size}")
    if algorithm.takes_segments:
        table.add_row("segments s", f"{num_segments}")
    table.add_row("rounds", f"{algorithm.rounds_formula}, here {algorithm.rounds(size, num_segments)}")
    table.add_row(
        "bytes sent",
        f"({algorithm.volume_formula}) x n, here {algorithm.volume(size, num_segments)} n, where n is the full buffer",
    )
    table.add_row("requires", algorithm.restrictions)
    for index, line in enumerate(_when_fastest(algorithm)):
        table.add_row("fastest" if index == 0 else "", line)
    table.add_row("source", algorithm.source)
    return table


def _when_fastest(algorithm: Algorithm) -> Iterator[str]:
    """Yield where the algorithm is the cheapest of its collective, on a typical cluster with a rank on each node."""
    cluster = Cluster()
    for size in _NUM_NODES:
        shape = Shape(size, 1, 1, size)
        sizes = sizes_between(_LEAST_NBYTES, _MOST_NBYTES, 2)
        winning = [
            nbytes for nbytes in sizes if _fastest(algorithm.collective, nbytes, shape, cluster) == algorithm.name
        ]
        where = "at no size"
        if winning:
            low, high = format_nbytes(winning[0]), format_nbytes(winning[-1])
            where = "at any size" if len(winning) == len(sizes) else f"from {low} to {high}"
            if winning[-1] == _MOST_NBYTES and len(winning) < len(sizes):
                where = f"from {low}"
        yield f"of {len(ALGORITHMS[algorithm.collective])} on {size} nodes: {where}"
    yield f"(prices: {cluster.cross_latency_s * 1e6:g} us a round, {cluster.cross_bytes_per_s / 1e9:g} GB/s a node;"
    yield " other values: mpitrain simulate)"


def _fastest(collective: str, nbytes: int, shape: Shape, cluster: Cluster) -> str:
    return min(ALGORITHMS[collective], key=lambda name: time_s(collective, name, nbytes, shape, cluster))
