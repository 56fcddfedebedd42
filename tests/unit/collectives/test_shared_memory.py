"""Shared memory that runs out, and jobs that end badly while they use it: real jobs, with a /dev/shm of their own."""

from __future__ import annotations

import functools
import logging
import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpitrain.collectives import Communicator, Handle
from mpitrain.errors import CollectiveError, CollectiveMismatchError, UnavailableError
from mpitrain.memory import SharedArray, as_dtype
from tests.support.limits import HANG_S
from tests.support.ranks import SETTINGS, outcome, run_communicators

MPIRUN = Path(sys.executable).parent / "mpirun"
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
        done = subprocess.run(probe, capture_output=True, text=True, timeout=HANG_S, check=False)
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
        timeout=HANG_S,
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
    "killed while its memory is read": """
        large = np.ones(1 << 20, np.float32)
        if comm.rank == 1:
            threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGKILL)).start()
        while True:
            comm.allreduce_(large, algorithm="direct")
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


def told_apart(comm: Communicator, first: Any, second: Any, form: str, **options: Any) -> None:
    """Rank 0 passes the first array, the others the second; then all pass the same one."""
    error = outcome(lambda: waited(getattr(comm, form)(first if comm.rank == 0 else second, **options)))
    assert isinstance(error, CollectiveMismatchError), error
    assert " in array " in str(error)
    waited(getattr(comm, form)(first, **options))


def waited(result: Any) -> Any:
    return result.wait(HANG_S) if isinstance(result, Handle) else result


FORMS = {
    "allreduce_": {"op": "max"},
    "allreduce_async_": {},
    "reduce": {"root": 1},
    "reduce_async": {},
    "reduce_scatter": {},
    "allgather": {},
    "broadcast_": {"root": 1},
    "broadcast_async_": {},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("size", "count"), [(2, 5), (3, 50_000), (4, 7)])
def test_different_shared_arrays_are_told_apart(form: str, size: int, count: int) -> None:
    def body(comm: Communicator) -> None:
        first, second = (comm.allocate(count, "float32") for _ in range(2))
        whole = comm.allocate(3 * count + 64, "float32")
        parts = [whole.part(as_dtype("float32"), offset, count) for offset in (0, 64)]
        options = {"algorithm": "direct", **FORMS[form]}
        for _ in range(2):
            # The second time such calls have been seen before.
            told_apart(comm, first, second, form, **options)
            told_apart(comm, *parts, form, **options)
        first.flat[:] = comm.rank
        comm.duplicate().allreduce_(first, algorithm="direct")
        assert first.flat.tolist() == [sum(range(size))] * count

    run_communicators(size, body)


@pytest.mark.parametrize("count", [5, 50_000])
def test_shared_arrays_of_other_ranks_are_ordinary_ones(count: int) -> None:
    def body(comm: Communicator) -> None:
        # The same ranks in another order, and only some of them.
        for color, key in ((0, -comm.rank), (comm.rank % 2, 0)):
            part = comm.split(color, key)
            assert part is not None
            array = part.allocate(count, "float32")
            for form in ("allreduce_", "allreduce_async_"):
                array.flat[:] = comm.rank + 1
                waited(getattr(comm, form)(array))
                assert array.flat.tolist() == [6.0] * count
            array.flat[:] = comm.rank + 1
            assert comm.allgather(array).flat.tolist() == [value for value in (1.0, 2.0, 3.0) for _ in range(count)]
            own = comm.allocate(count, "float32")
            error = outcome(lambda: comm.allreduce_(own if comm.rank == 2 else array))  # noqa: B023
            assert isinstance(error, CollectiveMismatchError)

    run_communicators(3, body)


MISTAKES = {
    "dtype": (lambda odd: (7, "float31" if odd else "float32"), TypeError),
    "shape": (lambda odd: ("seven" if odd else 7, "float32"), TypeError),
    "negative": (lambda odd: ((3, -1) if odd else (3, 1), "float32"), ValueError),
    "difference": (lambda odd: (7 + odd, "float32"), CollectiveMismatchError),
    "difference of dtype": (lambda odd: (7, "int32" if odd else "float32"), CollectiveMismatchError),
    "memory": (lambda odd: (1 << 58 if odd else 7, "float32"), CollectiveMismatchError),
}


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("shared_memory", [True, False])
def test_a_mistake_of_one_rank_in_an_allocation_is_an_error_on_every_rank(mistake: str, shared_memory: bool) -> None:
    arguments, kind = MISTAKES[mistake]

    def body(comm: Communicator) -> None:
        is_odd = comm.rank == 1
        error = outcome(lambda: comm.allocate(*arguments(is_odd)))
        assert isinstance(error, kind if is_odd else CollectiveMismatchError), error
        assert comm.allocate(7, "float32").shape == (7,)

    run_communicators(3, body, settings=SETTINGS.replace(shared_memory=shared_memory))


def test_memory_that_one_rank_does_not_get_is_an_error_on_every_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    private = SharedArray.private

    def body(comm: Communicator) -> None:
        if comm.rank == 1:
            poor.add(threading.get_ident())
        error = outcome(lambda: comm.allocate(7, "float32"))
        assert isinstance(error, MemoryError if comm.rank == 1 else CollectiveError), error
        assert "rank 1" in str(error) or comm.rank == 1
        poor.clear()
        comm.barrier()
        assert comm.allocate(7, "float32").shape == (7,)

    def made(*arguments: Any) -> SharedArray:
        if threading.get_ident() in poor:
            raise MemoryError("out of memory")
        return private(*arguments)

    poor: set[int] = set()
    monkeypatch.setattr(SharedArray, "private", made)
    run_communicators(3, body, settings=SETTINGS.replace(shared_memory=False))
