"""The command `mpitrain tune`: measures, prints and stores."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime as dt
import platform
import statistics
from pathlib import Path

import rich.console

import mpitrain
from mpitrain.bench.measure import sizes_between
from mpitrain.cli.console import make_console
from mpitrain.cli.job import JobError, check_writable, on_rank_0
from mpitrain.cli.tune_tables import progress, table_of_choices, table_of_times
from mpitrain.cli.tuning import Effort, Measurement, keys_of, measure, steps_of
from mpitrain.collectives import Communicator
from mpitrain.collectives.table import Key, Shape, Steps, Table
from mpitrain.collectives.table_file import Machine, read_table, store_table, table_path
from mpitrain.config import Settings

__all__ = ["Request", "tune_job"]

_SMALLEST_NBYTES = 8
_THOROUGH = Effort(factor=2, passes=3, rounds=(2, 9))
_QUICK = Effort(factor=8, passes=2, rounds=(2, 7))
# Half of the times differ by more than this from others of the same: worth a warning, and worth nothing at all.
_NOISY = 0.1
_TOO_NOISY = 0.5
_CANNOT_STORE = ("table: cannot be stored", "name another place with --output")


@dataclasses.dataclass(frozen=True)
class Request:
    """The options of the command."""

    collectives: tuple[str, ...]
    max_nbytes: int
    quick: bool
    minutes: float
    output: Path | None
    times: bool
    dry_run: bool


def tune_job(request: Request, settings: Settings) -> None:
    """Run the command. Every rank must call.

    Raises:
        JobError: It cannot be done; on every rank.
    """
    comm = Communicator.from_mpi(settings=settings)
    if comm.size == 1:
        raise JobError("ranks: need at least 2, got 1; use mpirun -np 2 mpitrain tune", is_speaker=True)
    machine = Machine.here(comm.transport)
    path = request.output or table_path(machine, settings)
    if not request.dry_run:
        on_rank_0(comm, lambda: check_writable(path), *_CANNOT_STORE)
    console = make_console() if comm.rank == 0 else rich.console.Console(quiet=True)
    measurements = _measure(comm, request, console)
    choices = {key: steps_of(rows) for key, rows in measurements.items()}
    if request.times:
        for key, rows in measurements.items():
            console.print(table_of_times(key, rows))
    title = f"{Shape.of(comm.topology)} ranks on {machine}"
    console.print(table_of_choices(title, measurements, choices))
    noise = statistics.median(each.noise for rows in measurements.values() for each in rows)
    if noise > _NOISY:
        console.print(f"times vary by {noise:.0%} from one round or pass to another; best tune an idle machine")
    if noise > _TOO_NOISY and request.output is None and not request.dry_run:
        raise JobError(
            f"times: too unsteady to be stored, vary by {noise:.0%}; tune again when the machine is idle, or name a "
            "file with --output",
            is_speaker=comm.rank == 0,
        )
    if not request.dry_run:
        on_rank_0(comm, lambda: _store(machine, choices, path), *_CANNOT_STORE)
        console.print(f"stored in {path}", soft_wrap=True, highlight=False)
    comm.free()


def _measure(comm: Communicator, request: Request, console: rich.console.Console) -> dict[Key, list[Measurement]]:
    effort = _QUICK if request.quick else _THOROUGH
    sizes = sizes_between(_SMALLEST_NBYTES, request.max_nbytes, effort.factor)
    keys = keys_of(comm, request.collectives)
    measurements: dict[Key, list[Measurement]] = {}
    with (
        progress(console, keys, len(sizes) * effort.passes)
        if comm.rank == 0
        else contextlib.nullcontext(_ignore) as on_item
    ):
        for each in measure(comm, keys, sizes, effort, limit_s=request.minutes * 60, on_item=on_item):
            measurements.setdefault(each.key, []).append(each)
    missing = len(keys) * len(sizes) - sum(map(len, measurements.values()))
    if missing:
        console.print(
            f"{missing} of {len(keys) * len(sizes)} measurements left out; allow more --minutes, or more shared memory"
        )
    return measurements


def _ignore(_key: Key, _nbytes: int) -> None:
    """Only rank 0 shows how far the measurements are."""


def _store(machine: Machine, choices: dict[Key, Steps], path: Path) -> None:
    versions = {
        "mpitrain": mpitrain.__version__,
        machine.mpi: machine.mpi_version,
        "Python": platform.python_version(),
    }
    today = dt.datetime.now(tz=dt.timezone.utc).date()
    table = Table(machine.fingerprint, versions, today, choices)
    # What cannot be used any more is replaced.
    with contextlib.suppress(FileNotFoundError, ValueError):
        table = read_table(path, machine).updated(table)
    store_table(table, path)
