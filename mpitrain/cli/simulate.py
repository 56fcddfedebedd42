"""The command `mpitrain simulate`."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import rich.box
import rich.console
import rich.table

from mpitrain.bench.bandwidth import COLLECTIVES
from mpitrain.bench.fit import Observation, error_of, fit_cluster, observations_of
from mpitrain.bench.measure import sizes_between
from mpitrain.bench.model import Cluster, priced_algorithms, time_s
from mpitrain.bench.results import CollectiveRun, read_results
from mpitrain.bench.units import format_nbytes, format_s
from mpitrain.cli.console import make_console
from mpitrain.cli.options import parse_sizes_option
from mpitrain.collectives.table import Shape

__all__ = ["simulate"]

# Options by field: name, unit, factor of the unit, meaning.
_FIELDS: dict[str, tuple[str, str, float, str]] = {
    "call_s": ("--call", "US", 1e-6, "What every call takes besides its rounds, in microseconds."),
    "shared_call_s": ("--shared-call", "US", 1e-6, "The same of an all-reduce in shared memory, in microseconds."),
    "latency_s": ("--latency", "US", 1e-6, "Of a round within a node, in microseconds."),
    "cross_latency_s": ("--cross-latency", "US", 1e-6, "Of a round between nodes, in microseconds."),
    "bytes_per_s": ("--bandwidth", "GB/S", 1e9, "Of each rank, in each direction."),
    "reduction_bytes_per_s": ("--reduction", "GB/S", 1e9, "What a rank reduces."),
    "cross_bytes_per_s": ("--cross-bandwidth", "GB/S", 1e9, "Of the link of a node, in each direction."),
    "memory_bytes_per_s": ("--memory", "GB/S", 1e9, "What the ranks of a node reduce in memory that they share."),
}
_UNITS = {"US": "us", "GB/S": "GB/s"}
_ACCEPTABLE_ERROR = 0.25
_MOST_RANKS = 100_000


def _with_fields(command: Any) -> Any:
    for field, (option, unit, factor, text) in reversed(_FIELDS.items()):
        usual = getattr(Cluster(), field) / factor
        command = click.option(option, field, type=float, metavar=unit, help=f"{text} [default: {usual:g}]")(command)
    return command


@click.command()
@click.argument("collective", type=click.Choice(COLLECTIVES), default="allreduce")
@click.option("--nodes", type=click.IntRange(min=1), default=8, show_default=True, help="Number of nodes.")
@click.option("--ranks-per-node", type=click.IntRange(min=1), default=8, show_default=True, help="Ranks on each.")
@click.option(
    "--sizes",
    default="1K:1G",
    show_default=True,
    metavar="MIN:MAX",
    callback=parse_sizes_option,
    help="Bytes of the full buffer.",
)
@click.option("--factor", type=click.IntRange(min=2), default=32, show_default=True, help="From size to size.")
@_with_fields
@click.option(
    "--fit",
    "fit_paths",
    type=click.Path(path_type=Path),
    multiple=True,
    metavar="FILE",
    help="Find the values above by measured times, which mpitrain bench --json has written; may be repeated.",
)
@click.option(
    "--check",
    "check_paths",
    type=click.Path(path_type=Path),
    multiple=True,
    metavar="FILE",
    help="Compare predictions with further measured times; may be repeated.",
)
def simulate(**given: Any) -> None:
    """Predict how long each algorithm takes on a cluster, and which one wins.

    Up to 100,000 ranks, from what is said about the cluster or from times that were measured on a small part of it.
    Starts no MPI.
    """
    size = given["nodes"] * given["ranks_per_node"]
    if size > _MOST_RANKS:
        raise click.BadParameter(f"must be at most {_MOST_RANKS} ranks, got {size}", param_hint="'--nodes'")
    said = {
        field: given[field] * factor for field, (_, _, factor, _) in _FIELDS.items() if given.get(field) is not None
    }
    cluster = Cluster(**said)
    console = make_console()
    if given["fit_paths"]:
        fitted = _observations(given["fit_paths"])
        cluster = dataclasses.replace(fit_cluster(fitted, cluster), **said)
        console.print(_table_of_values(cluster, said))
        console.print(table_of_errors("Prediction / measurement - 1, where it was fitted", fitted, cluster))
    if given["check_paths"]:
        checked = _observations(given["check_paths"])
        console.print(table_of_errors("Prediction / measurement - 1, on further measurements", checked, cluster))
    shape = Shape(given["nodes"], given["ranks_per_node"], given["ranks_per_node"], size)
    low, high = given["sizes"]
    console.print(table_of_predictions(given["collective"], sizes_between(low, high, given["factor"]), shape, cluster))


def _observations(paths: Sequence[Path]) -> list[Observation]:
    found: list[Observation] = []
    for path in paths:
        results = read_results(path)
        usable = observations_of(results) if isinstance(results, CollectiveRun) else []
        if not usable:
            raise ValueError(
                f"results {path}: no times of float32 sums by algorithms that have a price; "
                "measure with mpitrain bench allreduce --json FILE"
            )
        found += usable
    return found


def _table_of_values(cluster: Cluster, said: dict[str, float]) -> rich.table.Table:
    table = rich.table.Table(title="Fitted values", box=rich.box.SIMPLE_HEAD, title_justify="left")
    table.add_column("option")
    table.add_column("value", justify="right")
    table.add_column("")
    for field, (option, unit, factor, text) in _FIELDS.items():
        origin = "as given" if field in said else text
        table.add_row(option, f"{getattr(cluster, field) / factor:.4g} {_UNITS[unit]}", origin)
    return table


def table_of_errors(title: str, observations: Sequence[Observation], cluster: Cluster) -> rich.table.Table:
    """Return the errors of predictions, by algorithm and shape."""
    table = rich.table.Table(title=title, box=rich.box.SIMPLE_HEAD, title_justify="left")
    for heading in ("collective", "algorithm", "nodes x ranks", "sizes"):
        table.add_column(heading)
    for heading in ("median", "worst"):
        table.add_column(heading, justify="right")
    groups: dict[tuple[str, str, Shape], list[Observation]] = {}
    for each in observations:
        groups.setdefault((each.collective, each.algorithm, each.shape), []).append(each)
    for (collective, algorithm, shape), members in groups.items():
        errors = [error_of(each, cluster) for each in members]
        worst = max(errors, key=abs)
        sizes = sorted(each.nbytes for each in members)
        table.add_row(
            collective,
            algorithm,
            str(shape),
            f"{format_nbytes(sizes[0])} - {format_nbytes(sizes[-1])}",
            f"{statistics.median(map(abs, errors)):.0%}",
            f"{worst:+.0%}",
            style="red" if abs(worst) > _ACCEPTABLE_ERROR else None,
        )
    return table


def table_of_predictions(collective: str, sizes: Sequence[int], shape: Shape, cluster: Cluster) -> rich.table.Table:
    """Return the time of each algorithm at each size."""
    title = f"Predicted time of {collective} on {shape} = {shape.size} ranks; the fastest is marked"
    table = rich.table.Table(title=title, box=rich.box.SIMPLE_HEAD, title_justify="left")
    table.add_column("size", justify="right")
    names = priced_algorithms(collective, shape)
    for name in names:
        table.add_column(name, justify="right")
    table.add_column("fastest", no_wrap=True, min_width=max(map(len, names)))
    for nbytes in sizes:
        times_s = {name: time_s(collective, name, nbytes, shape, cluster) for name in names}
        best = min(times_s, key=lambda name: times_s[name])
        cells = [
            f"[bold green]{format_s(times_s[name])}[/]" if name == best else format_s(times_s[name]) for name in names
        ]
        table.add_row(format_nbytes(nbytes), *cells, best)
    return table
