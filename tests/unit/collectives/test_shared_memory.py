"""Shared memory that runs out, and jobs that end badly while they use it: real jobs, with a /dev/shm of their own."""

from __future__ import annotations

import functools
import logging
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from mpitrain.collectives import Communicator
from mpitrain.errors import UnavailableError
from tests.support.ranks import SETTINGS, run_communicators

MPIRUN = Path(sys.executable).parent / "mpirun"
LIMIT_S = 60.0
pytestmark = pytest.mark.timeout(90)

PROLOGUE = """
import os, signal, sys, threading
import numpy as np
from mpitrain import Communicator
comm = Communicator.from_mpi()
buffer = comm.allocate(1 << 19, "float32")
buffer.numpy()[:] = comm.rank
comm.allreduce_(buffer)
"""


@functools.cache
def why_unavailable() -> str:
    if not MPIRUN.exists():
        return "no mpirun beside the interpreter: install an MPI wheel"
    probe = ["unshare", "--mount", "mount", "-t", "tmpfs", "-o", "size=1m", "none", "/dev/shm"]
    try:
        done = subprocess.run(probe, capture_output=True, text=True, timeout=20, check=False)
    except OSError as error:
        return f"cannot unshare: {error}"
    return f"cannot mount: {done.stderr.strip()}" if done.returncode else ""


def run_with_own_memory(
    size: int, body: str, memory: str = "512m", prologue: str = PROLOGUE, **variables: str
) -> tuple[int, str, list[str]]:
    """Run a job; return exit status, output, and what it has left in /dev/shm."""
    if reason := why_unavailable():
        pytest.skip(reason)
    script = (
        'mount -t tmpfs -o size="$1" none /dev/shm; shift; "$@"; code=$?; echo "left:" $(ls -A /dev/shm); exit $code'
    )
    program = [sys.executable, "-c", prologue + textwrap.dedent(body)]
    done = subprocess.run(
        ["unshare", "--mount", "bash", "-c", script, "bash", memory, MPIRUN, "-np", str(size), *program],
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
        env={**os.environ, **variables},
    )
    *output, left = done.stdout.splitlines()
    assert left.startswith("left:")
    return done.returncode, "\n".join([*output, done.stderr]), left.split()[1:]


ENDINGS = {
    "well": "comm.barrier()",
    "by an exception": "raise KeyError('batch 17') if comm.rank == 1 else None\ncomm.allreduce_(buffer)",
    "killed": "os.kill(os.getpid(), signal.SIGKILL) if comm.rank == 1 else None\ncomm.allreduce_(buffer)",
    "killed in the middle": """
        if comm.rank == 1:
            threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGKILL)).start()
        while True:
            comm.allreduce_(buffer)
    """,
    "by an exception in the middle": """
        from mpitrain.collectives.reduction import Reduction
        handle = comm.allreduce_async_(buffer)
        if comm.rank == 1:
            Reduction.combine = None
        while True:
            comm.allreduce_(buffer)
    """,
}


@functools.cache
def num_left_by_mpi_itself() -> int:
    """MPICH leaves a segment of its own behind when a rank is killed."""
    body = "os.kill(os.getpid(), signal.SIGKILL) if MPI.COMM_WORLD.rank == 1 else MPI.COMM_WORLD.barrier()"
    return len(run_with_own_memory(2, body, prologue="import os, signal\nfrom mpi4py import MPI\n")[2])


@pytest.mark.parametrize("ending", ENDINGS)
def test_no_segment_is_left_behind(ending: str) -> None:
    code, output, left = run_with_own_memory(2, ENDINGS[ending])
    assert (code == 0) == (ending == "well"), output
    assert len(left) == (num_left_by_mpi_itself() if "killed" in ending else 0), (left, output)


def test_memory_that_has_run_out_is_told_and_replaced() -> None:
    body = """
        large = comm.allocate(1 << 25, "float32")
        assert not large.is_shared
        large.numpy()[:] = comm.rank + 1
        comm.allreduce_(large)
        assert (large.numpy() == 3).all()
        print("went on")
    """
    # There is room for what communicators need, and for a small array.
    code, output, left = run_with_own_memory(2, body, "128m")
    assert code == 0, output
    assert output.count("went on") == 2
    assert "asked for 256.0 MiB of which" in output
    assert "going on with private memory and messages" in output
    assert left == []


def test_communicators_do_without_memory_that_is_not_there() -> None:
    body = """
        assert not buffer.is_shared
        assert (buffer.numpy() == 1).all()
        print("went on")
    """
    code, output, _ = run_with_own_memory(2, body, MPITRAIN_STAGING_NBYTES=str(256 << 20))
    assert code == 0, output
    assert output.count("went on") == 2
    assert "ranks exchange messages instead, which is slower" in output


def test_one_node_without_memory_is_enough_for_all(caplog: pytest.LogCaptureFixture) -> None:
    """Whether memory is shared decides which messages there are, so it is the same on all ranks."""

    def body(comm: Communicator) -> tuple[bool, list[float]]:
        real = comm._context.node
        assert real is not None
        if comm.topology.node_index == 1:

            def allocate(nbytes: int) -> None:
                raise UnavailableError("full")

            real.allocate = allocate  # type: ignore[assignment, method-assign]
        array = comm.allocate(8, "float32")
        array.numpy()[:] = comm.rank
        comm.allreduce_(array)
        return array.is_shared, array.numpy().tolist()

    with caplog.at_level(logging.WARNING, "mpitrain"):
        results = run_communicators(4, body, ranks_per_node=2, settings=SETTINGS)
    assert results == [(False, np.full(8, 6.0).tolist())] * 4
    assert "full; going on with private memory" in caplog.text
