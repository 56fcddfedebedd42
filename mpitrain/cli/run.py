"""`mpitrain run`: starts a program on many ranks with whatever launcher there is."""

from __future__ import annotations

import os
import secrets
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import click

from mpitrain.cli.job import JobError
from mpitrain.config import Settings, copy_environment, prepare_mpi_wheel
from mpitrain.errors import LaunchError
from mpitrain.launch import (
    BINDINGS,
    KINDS,
    Host,
    JobRequest,
    build_command,
    check_names,
    check_user,
    find_launcher,
    is_rank,
    names_to_forward,
    parse_hosts,
    place_ranks,
    read_hostfile,
    run_job,
)

__all__ = ["run"]

# By these a process knows that a batch system has given it hosts: Slurm, PBS and Torque, LSF, Grid Engine.
_ALLOCATIONS = ("SLURM_JOB_ID", "PBS_NODEFILE", "LSB_DJOB_HOSTFILE", "PE_HOSTFILE")


@click.command(context_settings={"allow_interspersed_args": False})
@click.option(
    "-np", "size", type=click.IntRange(min=1), metavar="N", help="Number of ranks; all slots if hosts are given."
)
@click.option("-H", "--hosts", metavar="LIST", help="Hosts with their slots, such as node0:4,node1:4.")
@click.option("--hostfile", type=click.Path(path_type=Path), help="File that lists hosts, of Open MPI, MPICH or plain.")
@click.option("--algorithm", metavar="NAME", help="Of all-reduces that name none; sets MPITRAIN_ALGORITHM.")
@click.option(
    "--timeline",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write a timeline of all ranks to this file; sets MPITRAIN_TIMELINE.",
)
@click.option(
    "-x", "variables", multiple=True, metavar="NAME[=VALUE]", help="Pass a variable to all ranks; repeatable."
)
@click.option("--horovod", is_flag=True, help="The program is a Python script written for Horovod.")
@click.option("--launcher", type=click.Choice(KINDS), help="Use this one, not the first that is found.")
@click.option(
    "--launcher-arg", "extra", multiple=True, metavar="ARG", help="Pass an argument to the launcher; repeatable."
)
@click.option(
    "--bind-to",
    "binding",
    type=click.Choice(BINDINGS),
    default="none",
    show_default=True,
    help="What ranks are bound to.",
)
@click.option("--oversubscribe", is_flag=True, help="Allow more ranks than cores or slots.")
@click.option("--tag/--no-tag", "tagged", default=True, show_default=True, help="Begin lines of output with the rank.")
@click.option("--dry-run", is_flag=True, help="Print the command that would be run, and end.")
@click.argument("program", nargs=-1, type=click.UNPROCESSED)
def run(
    *,
    size: int | None,
    hosts: str | None,
    hostfile: Path | None,
    algorithm: str | None,
    timeline: Path | None,
    variables: tuple[str, ...],
    horovod: bool,
    launcher: str | None,
    extra: tuple[str, ...],
    binding: str,
    oversubscribe: bool,
    tagged: bool,
    dry_run: bool,
    program: tuple[str, ...],
) -> int:
    """Run a program on many ranks.

    mpitrain run -np 8 -H node0:4,node1:4 python train.py

    Works with Open MPI, MPICH, Intel MPI and Slurm's srun, whichever is found. Settings (MPITRAIN_*, HOROVOD_*), PATH
    and PYTHONPATH are passed to all ranks. The exit status is that of the first rank that fails, which ends the others.
    """
    try:
        environ = copy_environment()
        names = _set_variables(environ, variables, algorithm, timeline)
        found = find_launcher(launcher)
        check_user(found, environ)
        listed = parse_hosts(hosts) if hosts else read_hostfile(hostfile) if hostfile else []
        placed, size, is_local = _place(listed, size, environ, oversubscribe=oversubscribe)
        request = JobRequest(
            program=_command_of(program, horovod=horovod),
            size=size,
            hosts=tuple(placed),
            is_local=is_local,
            variables=names_to_forward(environ, names),
            binding=binding,
            oversubscribe=oversubscribe,
            extra=extra,
            tagged=tagged,
            token="" if dry_run else f"mpitrain-{secrets.token_hex(8)}",
        )
        command = build_command(found, request)
        if dry_run:
            click.echo(shlex.join(command))
            return 0
        # Slurm knows its hosts itself.
        check_names(() if found.kind == "slurm" else placed)
        outcome = run_job(command, environ, request.token, size)
    except (LaunchError, ValueError) as error:
        raise JobError(str(error), is_speaker=True) from error
    if outcome.failure is not None:
        failure = outcome.failure
        click.echo(
            f"mpitrain: rank {failure.rank} on {failure.host} ended first with a failure, status {failure.status}; "
            "the others were stopped",
            err=True,
        )
    if outcome.lost:
        ranks = ", ".join(map(str, outcome.lost))
        click.echo(
            f"mpitrain: lost ranks {ranks}: nothing says how they ended; see what the launcher says, and whether their "
            "hosts are up",
            err=True,
        )
    return outcome.status


def _set_variables(
    environ: dict[str, str], variables: Sequence[str], algorithm: str | None, timeline: Path | None
) -> list[str]:
    """Put the variables of options into the environment of the launcher; return their names.

    Raises:
        LaunchError: It is that of a rank.
        ValueError: A setting has an unusable value.
    """
    if is_rank(environ):
        raise LaunchError("run: cannot start a job within a job, got a call by a rank; call it without mpirun")
    names = []
    for variable in variables:
        name, sign, value = variable.partition("=")
        names.append(name)
        if sign:
            environ[name] = value
    if algorithm is not None:
        environ["MPITRAIN_ALGORITHM"] = algorithm
    if timeline is not None:
        # Rank 0, which writes it, may run in another folder.
        environ["MPITRAIN_TIMELINE"] = str(timeline.absolute())
    Settings.from_environ(environ)
    environ.setdefault("PYTHONUNBUFFERED", "1")
    prepare_mpi_wheel(environ)
    return names


def _place(
    hosts: Sequence[Host], size: int | None, environ: dict[str, str], *, oversubscribe: bool
) -> tuple[list[Host], int, bool]:
    """Return where how many ranks run, how many there are, and whether all of them run on this machine.

    Raises:
        LaunchError: It is not said how many, or they are more than there is room for.
    """
    if hosts:
        if oversubscribe and size is not None:
            # As evenly as whole ranks allow, the first hosts getting one more.
            num_slots = sum(host.slots for host in hosts)
            times = max(1, -(-size // num_slots))
            hosts = [Host(host.name, host.slots * times) for host in hosts]
        placed = place_ranks(hosts, size)
        return placed, sum(host.slots for host in placed), False
    if size is None:
        raise LaunchError("run: the number of ranks is not known, got neither -np nor hosts; pass such as -np 4")
    is_local = not any(name in environ for name in _ALLOCATIONS)
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if is_local and size > num_cores and not oversubscribe:
        raise LaunchError(
            f"ranks: more than this machine has cores, got {size} for {num_cores}; "
            "pass --oversubscribe, or more hosts with -H"
        )
    return [], size, is_local


def _command_of(program: Sequence[str], *, horovod: bool) -> tuple[str, ...]:
    if not program:
        raise LaunchError("run: no program, got only options; end the command with such as: python train.py")
    return (sys.executable, "-m", "mpitrain.horovod", *program) if horovod else tuple(program)
