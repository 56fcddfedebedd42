"""The command `mpitrain bench`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from mpitrain.bench.bandwidth import COLLECTIVES
from mpitrain.bench.measure import Request, sizes_between
from mpitrain.bench.operation import IN_PLACE, MEMORIES, REDUCING
from mpitrain.bench.rivals import RIVALS
from mpitrain.bench.stopwatch import Effort
from mpitrain.cli.bench_job import Output, bench_collective, bench_training
from mpitrain.cli.job import meet
from mpitrain.cli.options import parse_list_option, parse_sizes_option
from mpitrain.config import Settings

__all__ = ["bench"]

Option = Callable[[Callable[..., None]], Callable[..., None]]

_FEWEST_ITERATIONS = 5


@click.group()
def bench() -> None:
    """Measure how fast collectives and training steps are.

    Start it on as many ranks as are to be measured: mpirun -np 4 mpitrain bench allreduce

    Sides are measured in turn, so that what disturbs the machine disturbs all alike; a time is that of the slowest
    rank. docs/benchmarks.md explains the columns.
    """


def _list_option(name: str, default: str, text: str) -> Option:
    return click.option(name, default=default, show_default=bool(default), callback=parse_list_option, help=text)


_OUTPUT_OPTIONS: tuple[Option, ...] = (
    click.option("--json", "json_path", type=click.Path(path_type=Path), metavar="FILE", help="Write all figures."),
    click.option("--csv", "csv_path", type=click.Path(path_type=Path), metavar="FILE", help="Write them as a table."),
)

_COLLECTIVE_OPTIONS: tuple[Option, ...] = (
    click.option(
        "--sizes",
        default="8:64M",
        show_default=True,
        metavar="MIN:MAX",
        callback=parse_sizes_option,
        help="Bytes of the full buffer.",
    ),
    click.option("--factor", type=click.IntRange(min=2), default=4, show_default=True, help="From size to size."),
    _list_option("--dtypes", "float32", "Element types, with commas between them."),
    _list_option("--algorithms", "", "Of ours, with commas between them; all if none is named."),
    _list_option("--compare", "mpi", f"Other libraries in the same rounds: {', '.join(RIVALS)}."),
    _list_option("--memory", "host", f"Where buffers lie: {', '.join(MEMORIES)}; of several all are measured."),
    click.option(
        "--iterations",
        type=click.IntRange(min=1),
        default=50,
        show_default=True,
        help="Samples of each side; a short call is repeated within one.",
    ),
    click.option("--warmup", type=click.IntRange(min=2), default=3, show_default=True, help="Samples before those."),
    click.option(
        "--seconds",
        type=click.FloatRange(min=0, min_open=True),
        default=2.0,
        show_default=True,
        help="No further samples of a size after so long.",
    ),
    click.option("--check/--no-check", default=True, show_default=True, help="Check the results at every size."),
    *_OUTPUT_OPTIONS,
)


def _command_of(collective: str) -> click.Command:
    options = list(_COLLECTIVE_OPTIONS)
    if collective in IN_PLACE:
        options.append(
            click.option("--in-place/--out-of-place", default=True, show_default=True, help="Which form to call.")
        )
    if collective in REDUCING:
        options.append(_list_option("--ops", "sum", "Reductions, with commas between them."))
    if collective == "allreduce":
        options.append(click.option("--persistent", is_flag=True, help="Make plans once and run them."))

    def command(**given: Any) -> None:
        settings = Settings.from_environ()
        low, high = given.pop("sizes")
        iterations = given.pop("iterations")
        effort = Effort((min(_FEWEST_ITERATIONS, iterations), iterations), given.pop("seconds"), given.pop("warmup"))
        output = Output(given.pop("json_path"), given.pop("csv_path"))
        compare = given.pop("compare")
        request = Request(
            collective=collective,
            sizes=tuple(sizes_between(low, high, given.pop("factor"))),
            memories=given.pop("memory"),
            effort=effort,
            **given,
        )
        meet((request, compare, output))
        bench_collective(request, compare, output, settings)

    for option in reversed(options):
        command = option(command)
    text = f"Measure {collective}: every algorithm at every size, checked, then timed."
    return click.command(collective, help=text)(command)


@bench.command()
@_list_option("--models", "mlp,gpt,resnet", "Synthetic models, with commas between them.")
@_list_option("--compare", "ddp", "What else to measure in the same rounds: ddp, or nothing.")
@click.option("--batch", type=click.IntRange(min=1), help="Samples per rank and step; by default what suits the model.")
@click.option("--threads", type=click.IntRange(min=1), help="Of each rank; by default its share of the cores.")
@click.option("--iterations", type=click.IntRange(min=1), default=20, show_default=True, help="Steps of each side.")
@click.option("--warmup", type=click.IntRange(min=2), default=3, show_default=True, help="Steps before those.")
@click.option(
    "--seconds",
    type=click.FloatRange(min=0, min_open=True),
    default=20.0,
    show_default=True,
    help="No further steps of a model after so long.",
)
@_OUTPUT_OPTIONS[0]
@_OUTPUT_OPTIONS[1]
def train(**given: Any) -> None:
    """Measure training steps of synthetic models.

    Each rank for itself, with DistributedOptimizer, and with DistributedDataParallel: samples per second, scaling
    efficiency against one rank, how much of the communication is exposed and hidden, cores and memory per rank.
    """
    settings = Settings.from_environ()
    output = Output(given.pop("json_path"), given.pop("csv_path"))
    iterations = given.pop("iterations")
    effort = Effort((min(_FEWEST_ITERATIONS, iterations), iterations), given.pop("seconds"), given.pop("warmup"))
    try:
        from mpitrain.bench.training import TrainRequest
    except ImportError as error:
        raise ValueError(f"bench train: {error}") from None
    request = TrainRequest(rivals=given.pop("compare"), effort=effort, **given)
    meet((request, output))
    bench_training(request, output, settings)


for _collective in COLLECTIVES:
    bench.add_command(_command_of(_collective))
