"""Collectives on device arrays among processes, on the stand-in for CuPy: every rank has a device of its own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from mpitrain.collectives import Communicator, agreement
from mpitrain.config import Settings
from mpitrain.errors import CollectiveMismatchError
from mpitrain.schedules import ALGORITHMS
from tests.support.cases import CHECKS, Case, device_grid, run_cases

pytestmark = pytest.mark.skipif(
    os.environ.get("MPITRAIN_TEST_SIZE") == "4", reason="4 ranks are threads, in tests/unit/collectives/test_staged.py"
)

COLLECTIVES = [name for name in CHECKS if name != "barrier"]
# So small that arrays have several pieces, which do not end where messages do.
SMALL_PIECES: dict[str, Any] = {"device_piece_nbytes": 64, "segment_nbytes": 48, "staging_nbytes": 1024}
PRIVATE = {"shared_device_memory": False, **SMALL_PIECES}
WAYS = {
    "in device memory": Settings(cuda_aware="no", **SMALL_PIECES),
    "staged in shared memory": Settings(cuda_aware="no", **PRIVATE),
    "staged by messages": Settings(cuda_aware="no", shared_memory=False, **PRIVATE),
    # The stand-in's device memory lies on the host, so every MPI takes it.
    "straight": Settings(cuda_aware="yes", **PRIVATE),
}


@pytest.fixture(params=WAYS)
def comm(request: Any) -> Iterator[Communicator]:
    made = Communicator.from_mpi(settings=WAYS[request.param])
    yield made
    made.free()


@pytest.mark.parametrize("library", ["cupy", "mixed"])
@pytest.mark.parametrize("collective", COLLECTIVES)
def test_every_collective_on_device_arrays(comm: Communicator, fake_cupy: Any, collective: str, library: str) -> None:
    assert run_cases(comm, collective, "auto", device_grid(collective, comm.size, library)) > 0


@pytest.mark.parametrize("collective", COLLECTIVES)
def test_native_collectives_on_images(comm: Communicator, fake_cupy: Any, collective: str) -> None:
    assert run_cases(comm, collective, "native", device_grid(collective, comm.size)) > 0


@pytest.mark.parametrize("collective", COLLECTIVES)
def test_every_schedule_in_device_memory(fake_cupy: Any, collective: str) -> None:
    comm = Communicator.from_mpi(settings=WAYS["straight"])
    cases = [Case(count=501, library="cupy", dtype=dtype) for dtype in ("float32", "int64", "float16")]
    for name in ALGORITHMS[collective]:
        run_cases(comm, collective, name, iter(cases))
    comm.free()


def test_plan_says_which_way_arrays_go(comm: Communicator, fake_cupy: Any, request: Any) -> None:
    handle = comm.allreduce_async(fake_cupy.ones(100))
    assert handle.wait().tolist() == [comm.size] * 100
    is_straight = comm.settings.cuda_aware == "yes" or comm.size == 1  # who is alone copies nothing
    way = "straight to MPI" if is_straight else "staged through pinned memory"
    if comm.settings.shared_device_memory and comm.size > 1:
        way = "through device memory"
    assert way in handle.description


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("verb", ["allreduce", "allreduce_async", "plan_allreduce_", "broadcast", "allgather"])
def test_ranks_fall_back_together_where_one_brings_memory_of_the_host(fake_cupy: Any, verb: str) -> None:
    comm = Communicator.from_mpi(settings=WAYS["straight"])
    for turn in range(6):
        # All on devices at first, so that they go straight to MPI, then the last rank's on the host, then all again.
        library = np if turn in (2, 3) and comm.rank == comm.size - 1 else fake_cupy
        array = library.full(40, comm.rank + 1.0)
        result = getattr(comm, verb)(array)
        if verb == "plan_allreduce_":
            result = result.run()
        elif verb.endswith("async"):
            result = result.wait()
        total = comm.size * (comm.size + 1) / 2
        expected = {"broadcast": [1.0] * 40, "allgather": [r + 1.0 for r in range(comm.size) for _ in range(40)]}
        assert type(result) is library.ndarray
        assert result.tolist() == expected.get(verb, [total] * 40)
    comm.free()


@pytest.mark.mpi(min_size=2)
def test_quick_calls_of_the_host_meet_devices(fake_cupy: Any) -> None:
    """A rank that has called before with the same host array does not make a plan, and falls back all the same."""
    comm = Communicator.from_mpi(settings=Settings(cuda_aware="yes"))
    host = np.full(40, comm.rank + 1.0)
    total = comm.size * (comm.size + 1) / 2
    for count in (40, 20000):
        host = np.full(count, comm.rank + 1.0)
        for turn in range(4):
            is_device = turn == 3 and comm.rank == 0
            array = fake_cupy.full(count, 1.0) if is_device else host
            assert comm.allreduce(array).tolist() == [total] * count
        comm.devices._awareness = None
    comm.free()


@pytest.mark.mpi(min_size=2)
def test_different_things_are_an_error_whatever_memory_they_lie_in(fake_cupy: Any) -> None:
    comm = Communicator.from_mpi(settings=WAYS["straight"])
    array = fake_cupy.ones(7) if comm.rank else np.ones(8)
    with pytest.raises(CollectiveMismatchError, match="different things"):
        comm.allreduce(array)
    assert comm.allreduce(fake_cupy.ones(3)).tolist() == [comm.size] * 3
    comm.free()


@pytest.mark.mpi(min_size=2)
def test_ranks_fall_back_with_descriptions_that_are_cut(fake_cupy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agreement, "_DESCRIPTION_NBYTES", 32)
    comm = Communicator.from_mpi(settings=WAYS["straight"])
    array = (np if comm.rank == 0 else fake_cupy).full((5, 7), comm.rank)
    assert comm.allgather(array).reshape(-1).tolist() == [rank for rank in range(comm.size) for _ in range(35)]
    with pytest.raises(CollectiveMismatchError, match="different things"):
        comm.allgather(array if comm.rank else array.astype(np.float32))
    comm.free()
