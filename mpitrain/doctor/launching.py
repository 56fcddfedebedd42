"""Whether ranks can be started here and on other hosts."""

from __future__ import annotations

import concurrent.futures
import re
import shutil
import sys
from collections.abc import Sequence

from mpitrain.config import copy_environment, prepare_mpi_wheel
from mpitrain.doctor.findings import Finding
from mpitrain.errors import LaunchError
from mpitrain.launch import Host, JobRequest, Launcher, build_command, check_user, find_launcher, is_known
from mpitrain.programs import run_program

__all__ = ["check_launcher", "check_reach"]

_LIMIT_S = 60.0
_SIZE = 2
_PROGRAM = "from mpi4py import MPI; print(f'size {MPI.COMM_WORLD.Get_size()};')"
# By these Open MPI 5 and 4, MPICH and Intel MPI are told of another program in place of ssh.
_AGENT_VARIABLES = (
    "PRTE_MCA_plm_ssh_agent",
    "OMPI_MCA_plm_rsh_agent",
    "HYDRA_LAUNCHER_EXEC",
    "I_MPI_HYDRA_BOOTSTRAP_EXEC",
)


def check_launcher() -> list[Finding]:
    """Look for a launcher and have it start two ranks on this machine, which must find each other."""
    try:
        launcher = find_launcher()
        check_user(launcher, copy_environment())
    except LaunchError as error:
        problem, _, remedy = str(error).partition("; ")
        return [Finding("launcher", "failure", problem, remedy)]
    found = Finding("launcher", "ok", f"{launcher} at {launcher.path}")
    if launcher.kind == "slurm":
        return [
            found,
            Finding("two ranks", "ok", "not tried: srun waits for an allocation; call the doctor under srun"),
        ]
    return [found, _try_two_ranks(launcher)]


def _try_two_ranks(launcher: Launcher) -> Finding:
    environ = copy_environment()
    prepare_mpi_wheel(environ)
    request = JobRequest(
        program=(sys.executable, "-c", _PROGRAM), size=_SIZE, is_local=True, oversubscribe=True, tagged=False
    )
    try:
        done = run_program(build_command(launcher, request), limit_s=_LIMIT_S, environ=environ)
    except OSError as error:
        return Finding("two ranks", "failure", f"do not start: {error}", "see whether the launcher works by itself")
    # Not by lines, which MPICH's launcher tears apart.
    sizes = re.findall(r"size (\d+);", done.output)
    if done.status or len(sizes) != _SIZE:
        # The first one: how ranks ended is told after what kept them from running.
        reason = done.complaints[0] if done.complaints else done.ending
        return Finding("two ranks", "failure", f"do not run: {reason}", f"try by hand: {launcher.path} -np 2 hostname")
    if sizes != [str(_SIZE)] * _SIZE:
        remedy = "use the mpirun of the library that mpi4py loads: one MPI per environment, one module loaded"
        return Finding("two ranks", "failure", "do not find each other, each is alone in its job", remedy)
    return Finding("two ranks", "ok", "start on this machine and find each other")


def check_reach(hosts: Sequence[Host]) -> list[Finding]:
    """Run a command on every host as a launcher would."""
    environ = copy_environment()
    agent = next((environ[name] for name in _AGENT_VARIABLES if name in environ), "ssh")
    path = shutil.which(agent)
    if path is None:
        return [Finding("hosts", "failure", f"{agent} not found, by which they are reached", "install an ssh client")]
    with concurrent.futures.ThreadPoolExecutor(32) as pool:
        return list(pool.map(lambda host: _reach(host, path), hosts))


def _reach(host: Host, agent: str) -> Finding:
    name = f"host {host.name}"
    if not is_known(host.name):
        return Finding(name, "failure", "unknown", "correct the name, or add it to /etc/hosts or ~/.ssh/config")
    # Nobody is there to type a password.
    options = ["-o", "BatchMode=yes", "-o", "ConnectTimeout=10"]
    try:
        done = run_program([agent, *options, host.name, "true"], limit_s=_LIMIT_S)
    except OSError as error:
        return Finding(name, "failure", f"does not answer: {error}", "see whether it is up, and its firewall")
    if done.status:
        remedy = f"make this work without a password: {agent} {host.name} true"
        return Finding(name, "failure", f"cannot be reached: {done.last_words}", remedy)
    return Finding(name, "ok", f"reached, {host.slots} slots")
