"""Runs the benchmarks of `mpitrain bench`, prints their tables and stores their results."""

from __future__ import annotations

import dataclasses
import datetime as dt
import functools
import platform
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import rich.console

import mpitrain
from mpitrain.bench.measure import Request, measure
from mpitrain.bench.results import CollectiveRun, Results, Row, Setup, TrainRun, to_csv, to_json
from mpitrain.bench.rivals import rivals_named
from mpitrain.cli.bench_tables import collective_heading, collective_lines, training_heading, training_lines
from mpitrain.cli.console import make_console
from mpitrain.cli.job import JobError, check_writable, on_rank_0
from mpitrain.collectives import Communicator
from mpitrain.collectives.table import Shape
from mpitrain.collectives.table_file import Machine, store_text
from mpitrain.config import Settings
from mpitrain.errors import UnavailableError

if TYPE_CHECKING:
    from mpitrain.bench.training import TrainRequest

__all__ = ["Output", "bench_collective", "bench_training"]


@dataclasses.dataclass(frozen=True)
class Output:
    """Files to write; None for none."""

    json_path: Path | None
    csv_path: Path | None

    def check(self, comm: Communicator) -> None:
        """Fail, on every rank, if a file cannot be written. Every rank must call."""
        for path in (self.json_path, self.csv_path):
            if path is not None:
                _on_rank_0(comm, functools.partial(check_writable, path))

    def store(self, comm: Communicator, results: Results) -> None:
        """Write the files. Every rank must call."""
        for path, text in ((self.json_path, to_json), (self.csv_path, to_csv)):
            if path is not None:
                _on_rank_0(comm, functools.partial(store_text, text(results), path))


def _on_rank_0(comm: Communicator, function: Callable[[], None]) -> None:
    on_rank_0(comm, function, "results: cannot be stored", "name another file")


def bench_collective(request: Request, compare: Sequence[str], output: Output, settings: Settings) -> None:
    """Measure a collective. Every rank must call.

    Raises:
        JobError: It cannot be done, or results are wrong; on every rank.
    """
    comm = Communicator.from_mpi(settings=settings)
    if comm.size == 1:
        raise JobError(
            f"ranks: need at least 2, got 1; use mpirun -np 2 mpitrain bench {request.collective}", is_speaker=True
        )
    output.check(comm)
    console = make_console() if comm.rank == 0 else rich.console.Console(quiet=True)
    try:
        run = _measure(comm, request, compare, console)
    except (ValueError, UnavailableError) as error:
        # What is refused is refused on all ranks.
        raise JobError(str(error), is_speaker=comm.rank == 0) from error
    _store(comm, output, run, console)
    wrong = [row for row in run.rows if row.wrong > 0]
    if wrong:
        names = ", ".join(sorted({row.label for row in wrong}))
        raise JobError(f"results: wrong for {names}; see the column #wrong", is_speaker=comm.rank == 0)
    comm.free()


def bench_training(request: TrainRequest, output: Output, settings: Settings) -> None:
    """Measure training steps. Every rank must call.

    Raises:
        JobError: It cannot be done, or the parameters are wrong afterwards; on every rank.
    """
    import mpitrain.torch as hvd
    from mpitrain.bench.training import measure_training

    hvd.init(settings=settings)
    comm = hvd.communicator()
    output.check(comm)
    console = make_console() if comm.rank == 0 else rich.console.Console(quiet=True)
    run = TrainRun(setup=describe_setup(comm), rows=())
    for line in training_heading(run):
        console.print(line, style="bold", highlight=False, soft_wrap=True)
    try:
        for rows in measure_training(request):
            run = dataclasses.replace(run, rows=(*run.rows, *rows))
            for line in training_lines(run, rows):
                console.print(line, highlight=False, soft_wrap=True)
            if comm.rank == 0:
                console.file.flush()
    except RuntimeError as error:
        raise JobError(str(error), is_speaker=comm.rank == 0) from error
    _store(comm, output, run, console)
    hvd.shutdown()


def _store(comm: Communicator, output: Output, results: Results, console: rich.console.Console) -> None:
    output.store(comm, results)
    for path in (output.json_path, output.csv_path):
        if path is not None:
            console.print(f"stored in {path}", soft_wrap=True, highlight=False)


def _measure(
    comm: Communicator, request: Request, compare: Sequence[str], console: rich.console.Console
) -> CollectiveRun:
    rows: list[Row] = []
    with rivals_named(compare, comm) as rivals:
        libraries = [rival.name for rival in rivals]
        run = CollectiveRun(
            setup=describe_setup(comm),
            collective=request.collective,
            in_place=request.in_place,
            persistent=request.persistent,
            libraries=libraries,
            rows=rows,
        )
        previous = None
        for at_size in measure(comm, request, rivals):
            if (heading := (at_size[0].dtype, at_size[0].op)) != previous:
                previous = heading
                for line in collective_heading(run, *heading):
                    console.print(line, style="bold", highlight=False, soft_wrap=True)
            fastest_s = min(row.median_s for row in at_size)
            for row, line in zip(at_size, collective_lines(run, at_size), strict=True):
                style = "red" if row.wrong > 0 else "green" if row.median_s == fastest_s else None
                console.print(line, style=style, highlight=False, soft_wrap=True)
            if comm.rank == 0:
                # Whoever follows the file sees it now.
                console.file.flush()
            rows += at_size
    return dataclasses.replace(run, rows=tuple(rows))


def describe_setup(comm: Communicator) -> Setup:
    """Return what a benchmark runs on. Every rank must call; rank 0's is the one that counts."""
    machine = Machine.here(comm.transport)
    versions = {
        "mpitrain": mpitrain.__version__,
        machine.mpi: machine.mpi_version,
        "Python": platform.python_version(),
        "NumPy": np.__version__,
    }
    if "torch" in sys.modules:
        versions["torch"] = str(sys.modules["torch"].__version__)
    usual = Settings()
    settings = {
        field.name: str(value)
        for field in dataclasses.fields(Settings)
        if (value := getattr(comm.settings, field.name)) != getattr(usual, field.name)
    }
    return Setup(
        machine=str(machine),
        shape=Shape.of(comm.topology),
        versions=versions,
        date=dt.datetime.now(tz=dt.timezone.utc).isoformat(timespec="seconds"),
        settings=settings,
        segment_nbytes=comm.settings.segment_nbytes,
    )
