"""The command that starts a job's ranks, for each kind of launcher."""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from mpitrain.errors import LaunchError
from mpitrain.launch.hosts import Host
from mpitrain.launch.launchers import Launcher

__all__ = ["BINDINGS", "JobRequest", "build_command", "names_to_forward"]

BINDINGS = ("none", "core", "numa")

_AGENT = Path(__file__).parent / "agent.py"
# What ranks need to find Python and its packages, and the settings of a job.
_FORWARDED = ("LD_LIBRARY_PATH", "OMP_NUM_THREADS", "PATH", "PYTHONPATH", "PYTHONUNBUFFERED", "VIRTUAL_ENV")
_FORWARDED_PREFIXES = ("MPITRAIN_", "HOROVOD_")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*", re.ASCII)
# Launchers take a lone colon for the end of a program's arguments; see `agent.py`.
_COLON = re.compile(r"\\*:")
_SLURM_BINDINGS = {"none": "none", "core": "cores", "numa": "ldoms"}


@dataclasses.dataclass(frozen=True)
class JobRequest:
    """What is to be started.

    Attributes:
        program: Program and arguments of every rank.
        size: Number of ranks.
        hosts: Where, with the number of ranks of each; () leaves it to the launcher, and the batch system it knows.
        is_local: The ranks run on this machine, and no batch system says otherwise.
        variables: Names of variables that ranks get from the environment of the launcher.
        binding: One of `BINDINGS`: a rank may run on all cores of its host, on one, or on those of one memory.
        oversubscribe: More ranks than cores are wanted.
        extra: Further arguments for the launcher.
        tagged: Each line of output begins with its rank.
        token: Word by which agents report a failure; "" for no reports.
    """

    program: tuple[str, ...]
    size: int
    hosts: tuple[Host, ...] = ()
    is_local: bool = False
    variables: tuple[str, ...] = ()
    binding: str = "none"
    oversubscribe: bool = False
    extra: tuple[str, ...] = ()
    tagged: bool = True
    token: str = ""


def names_to_forward(environ: Mapping[str, str], asked: Sequence[str]) -> tuple[str, ...]:
    """Return which variables ranks on other hosts get: settings, what Python needs, and those that were asked for.

    Raises:
        LaunchError: One that was asked for has no usable name or is not set.
    """
    for name in asked:
        if not _VARIABLE.fullmatch(name):
            raise LaunchError(f"variable: must have a name of letters, digits and _, got {name!r}; correct -x")
        if name not in environ:
            raise LaunchError(
                f"variable {name}: is not set, so it cannot be passed on; set it, or pass -x {name}=VALUE"
            )
    settings = [name for name in environ if name.startswith(_FORWARDED_PREFIXES) and _VARIABLE.fullmatch(name)]
    needed = [name for name in _FORWARDED if name in environ]
    return tuple(sorted({*settings, *needed, *asked}))


def build_command(launcher: Launcher, request: JobRequest) -> list[str]:
    """Return the program and the arguments that start the job; nothing of it is meant for a shell.

    Raises:
        LaunchError: The launcher cannot do what is asked.
    """
    builders = {"openmpi": _openmpi, "mpich": _mpich, "intelmpi": _intelmpi, "slurm": _slurm}
    return [launcher.path, *builders[launcher.kind](request)]


def _rank_command(request: JobRequest) -> list[str]:
    """Return what each rank runs: the agent, which runs the program."""
    options = [*(["--tag"] if request.tagged else []), *(["--token", request.token] if request.token else [])]
    program = ["\\" + word if _COLON.fullmatch(word) else word for word in request.program]
    return [sys.executable, "-ISs", str(_AGENT), *options, "--", *program]


def _openmpi(request: JobRequest) -> list[str]:
    arguments = ["-np", str(request.size)]
    # This machine is said to have as many slots as ranks: Open MPI counts cores, but not their hardware threads.
    hosts = (Host("localhost", request.size),) if request.is_local else request.hosts
    if hosts:
        arguments += ["--host", _list_of(hosts)]
    arguments += ["--map-by", "slot:OVERSUBSCRIBE" if request.oversubscribe else "slot", "--bind-to", request.binding]
    for name in request.variables:
        arguments += ["-x", name]
    return [*arguments, *request.extra, *_rank_command(request)]


def _mpich(request: JobRequest) -> list[str]:
    arguments = ["-np", str(request.size)]
    if request.hosts:
        arguments += ["-hosts", _list_of(request.hosts)]
    if request.binding != "none":
        arguments += ["-bind-to", request.binding]
    return [*arguments, *request.extra, *_rank_command(request)]


def _intelmpi(request: JobRequest) -> list[str]:
    binding = ["I_MPI_PIN", "0"] if request.binding == "none" else ["I_MPI_PIN_DOMAIN", request.binding]
    arguments = ["-genvall", "-genv", *binding, *request.extra]
    counts = {host.slots for host in request.hosts}
    if len(counts) <= 1:
        if request.hosts:
            names = ",".join(host.name for host in request.hosts)
            arguments += ["-ppn", str(counts.pop()), "-hosts", names]
        return [*arguments, "-n", str(request.size), *_rank_command(request)]
    # One list of hosts takes the same number of ranks on each, so each host has arguments of its own.
    for index, host in enumerate(request.hosts):
        separator = [":"] if index else []
        arguments += [*separator, "-host", host.name, "-n", str(host.slots), *_rank_command(request)]
    return arguments


def _slurm(request: JobRequest) -> list[str]:
    arguments = [f"--ntasks={request.size}"]
    if request.hosts:
        counts = {host.slots for host in request.hosts}
        if len(counts) > 1:
            raise LaunchError(
                f"srun: needs as many ranks on every host, got {_list_of(request.hosts)}; give hosts equal slots and "
                "-np a multiple of them, or start the job with an mpirun"
            )
        names = ",".join(host.name for host in request.hosts)
        arguments += [f"--nodes={len(request.hosts)}", f"--ntasks-per-node={counts.pop()}", f"--nodelist={names}"]
    arguments += ["--export=ALL", "--kill-on-bad-exit=1", f"--cpu-bind={_SLURM_BINDINGS[request.binding]}"]
    if request.oversubscribe:
        arguments.append("--overcommit")
    return [*arguments, *request.extra, *_rank_command(request)]


def _list_of(hosts: Sequence[Host]) -> str:
    return ",".join(f"{host.name}:{host.slots}" for host in hosts)
