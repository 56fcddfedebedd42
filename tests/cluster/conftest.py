"""Hosts for tests that need several; where the machine cannot make them, the tests are skipped and say why."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.emulated.cluster import HEAD, Cluster, why_unavailable
from tests.support.limits import HANG_S

REPOSITORY = Path(__file__).parents[2]
NUM_HOSTS = 3
MPIRUN = shutil.which("mpirun", path=str(Path(sys.executable).parent)) or shutil.which("mpirun")
VARIABLES = {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "MPITRAIN_TIMEOUT_S": "30"}


@pytest.fixture(scope="session")
def _emulation() -> None:
    if reason := why_unavailable():
        pytest.skip(reason)
    if MPIRUN is None:
        pytest.skip("needs an mpirun beside Python or in PATH")


@pytest.fixture(scope="session")
def cluster(_emulation: None) -> Iterator[Cluster]:
    """Hosts that all tests use, and leave as they are."""
    with Cluster(NUM_HOSTS) as made:
        yield made


@pytest.fixture
def own_cluster(_emulation: None) -> Iterator[Cluster]:
    """Hosts for a test that takes some of them down."""
    with Cluster(2, "1gbit") as made:
        yield made


@dataclasses.dataclass(frozen=True)
class Mpi:
    """How the MPI of this environment is told where ranks run."""

    is_openmpi: bool

    def mpirun(self, cluster: Cluster, slots: list[int], *arguments: object) -> list[object]:
        """Return the command that runs Python with so many ranks on each host."""
        size = ["-np", sum(slots)]
        if not self.is_openmpi:
            hosts = [f"{host}:{count}" for host, count in zip(cluster.hosts, slots, strict=True) if count]
            return [MPIRUN, *size, "-hosts", ",".join(hosts), sys.executable, *arguments]
        names = [word for name in VARIABLES for word in ("-x", name)]
        return [MPIRUN, *size, "--hostfile", cluster.hostfile(slots), *names, sys.executable, *arguments]


@pytest.fixture(scope="session")
def mpi(_emulation: None) -> Mpi:
    assert MPIRUN is not None
    told = subprocess.run([MPIRUN, "--version"], capture_output=True, text=True, check=True).stdout
    return Mpi("Open MPI" in told)


def run_on_head(cluster: Cluster, arguments: list[object]) -> subprocess.CompletedProcess[str]:
    return cluster.run(HEAD, arguments, VARIABLES, timeout=HANG_S)


def answer_of(done: subprocess.CompletedProcess[str]) -> Any:
    """Return what rank 0 of a job of `jobs.py` has printed."""
    assert done.returncode == 0, f"status {done.returncode}\n{done.stdout}\n{done.stderr}"
    return json.loads(next(line[line.index("{") :] for line in done.stdout.splitlines() if "{" in line))


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
