"""The commands, and how they end: an error is one message of rank 0 and exit status 2 on all ranks."""

from __future__ import annotations

import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any, NoReturn

import click

import mpitrain
from mpitrain.cli.bench import bench
from mpitrain.cli.doctor import doctor
from mpitrain.cli.explain import explain
from mpitrain.cli.job import JobError, meet
from mpitrain.cli.options import parse_nbytes_option
from mpitrain.cli.report import report
from mpitrain.cli.run import run as run_command
from mpitrain.cli.simulate import simulate
from mpitrain.cli.timeline import timeline
from mpitrain.cli.tune import Request, tune_job
from mpitrain.cli.tuning import COLLECTIVES
from mpitrain.config import Settings
from mpitrain.errors import MpitrainError

__all__ = ["run"]

_FAILED = 2
_INTERRUPTED = 130
_MINUTES = 3.0
_QUICK_MINUTES = 1.0
# The first process that ends with an error takes the others with it; rank 0 has to have spoken by then.
_PATIENCE_S = 1.0


@click.group(no_args_is_help=False)
@click.version_option(mpitrain.__version__, prog_name="mpitrain")
def commands() -> None:
    """MPI collectives and PyTorch training."""


@commands.command()
@click.option(
    "--collective", "collectives", multiple=True, type=click.Choice(COLLECTIVES), help="Only this one; may be repeated."
)
@click.option(
    "--max-size",
    "max_nbytes",
    callback=parse_nbytes_option,
    default="128M",
    metavar="SIZE",
    show_default=True,
    help="Largest buffer.",
)
@click.option("--quick", is_flag=True, help="Fewer sizes and repetitions; one minute instead of three.")
@click.option("--minutes", type=click.FloatRange(min=0, min_open=True), help="About how long to measure.")
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="Store the table in this file.")
@click.option("--times", is_flag=True, help="Print all measured times, too.")
@click.option("--dry-run", is_flag=True, help="Measure and print, but store nothing.")
def tune(**options: Any) -> None:
    """Measure which algorithm is the fastest on this machine.

    Start it on as many ranks as the jobs that are to profit: mpirun -np 4 mpitrain tune

    Measures all algorithms of the collectives at all sizes and stores the winners where jobs with as many ranks on as
    many nodes find them. What was measured with other numbers of ranks is kept.
    """
    # Settings that cannot be used are an error before any rank waits for another.
    settings = Settings.from_environ().replace(check=False)
    options["collectives"] = tuple(dict.fromkeys(options["collectives"] or COLLECTIVES))
    options["minutes"] = options["minutes"] or (_QUICK_MINUTES if options["quick"] else _MINUTES)
    request = Request(**options)
    meet(request)
    tune_job(request, settings)


for _command in (bench, explain, report, simulate, timeline):
    commands.add_command(_command)
commands.add_command(doctor)
commands.add_command(run_command)


def run() -> NoReturn:
    """Run the command line of this process and end it."""
    try:
        try:
            status = commands.main(standalone_mode=False)
        except click.ClickException as error:
            meet(None, f"{error.format_message().rstrip('.')}; see mpitrain --help")
        except ValueError as error:
            meet(None, str(error))
    except JobError as error:
        if error.is_speaker:
            click.echo(f"mpitrain: {error}", err=True)
        sys.exit(_FAILED)
    except KeyboardInterrupt:
        _end_at_once(_INTERRUPTED)
    except Exception as error:  # noqa: BLE001  (printed whole, and the process ends)
        # The other ranks may wait for this one, so nothing is tidied up that needs them.
        is_expected = isinstance(error, MpitrainError)
        click.echo(f"mpitrain: {error}" if is_expected else traceback.format_exc(), err=True)
        _end_at_once(_FAILED)
    sys.exit(status if isinstance(status, int) else 0)


def _end_at_once(status: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    time.sleep(_PATIENCE_S)
    os._exit(status)
