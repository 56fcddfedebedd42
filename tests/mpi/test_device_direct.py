"""All-reduce in device memory that processes share: on the stand-in for CuPy, and on a device where there is one."""

from __future__ import annotations

import contextlib
import gc

import numpy as np
import pytest

from mpitrain.collectives import Communicator, device_staging
from mpitrain.config import Settings
from mpitrain.errors import CommRevokedError
from mpitrain.memory.device import device_of, ipc
from tests.support.devices import each_cupy
from tests.support.fake_cupy import held_up
from tests.support.host_kernels import needs_compiler
from tests.support.ranks import outcome

__all__ = ["each_cupy"]


@pytest.fixture
def comm(each_cupy):
    comm = Communicator.from_mpi(settings=Settings(wait="sleep"))
    with each_cupy.cuda.Device(device_of(comm.topology.local_rank)):
        yield comm
    comm.free()
    comm.engine.close()


def values(rank, count, dtype="float32", turn=0):
    """Sums of these are exact, and different for every rank and index."""
    return (np.arange(count) % 61 + 64 * rank + 3 * turn).astype(dtype)


def everybodys(size, count, dtype="float32", turn=0):
    return np.stack([values(rank, count, dtype, turn) for rank in range(size)])


def filled(comm, count, dtype="float32"):
    array = comm.allocate(count, dtype, device="cuda")
    array.cupy().set(values(comm.rank, count, dtype))
    return array


@pytest.mark.parametrize("count", [0, 1, 3, 1000, (1 << 20) + 5])
def test_sum(comm, count):
    array = filled(comm, count)
    assert array.is_shared == (comm.size > 1)
    comm.allreduce_(array)
    np.testing.assert_array_equal(array.cupy().get(), everybodys(comm.size, count).sum(0))


@pytest.mark.parametrize(
    ("op", "dtype"),
    [("average", "float64"), ("average", "float16"), ("min", "float32"), ("max", "int32"), ("product", "int64")],
)
def test_operations(comm, op, dtype):
    count = 777
    array = comm.allocate(count, dtype, device="cuda")
    numbers = 1 + everybodys(comm.size, count, "float64") % 3
    array.cupy().set(numbers[comm.rank].astype(dtype))
    comm.allreduce_async_(array, op=op).wait()
    expected = {"average": np.mean, "min": np.min, "max": np.max, "product": np.prod}[op](numbers, 0)
    np.testing.assert_array_equal(array.cupy().get(), expected.astype(dtype))


def test_part_that_is_not_aligned(comm):
    memory = filled(comm, 5003)
    part = memory.part(memory.dtype, 4 * 3, 4999)
    comm.allreduce_(part)
    expected = values(comm.rank, 5003)
    expected[3:5002] = everybodys(comm.size, 5003).sum(0)[3:5002]
    np.testing.assert_array_equal(memory.cupy().get(), expected)


def test_work_before_and_after_is_ordered_without_waiting(each_cupy, comm):
    """What the caller queues before and after comes before and after, on a stream of its own, time and again."""
    array = comm.allocate(30_001, "float32", device="cuda")
    kept = comm.allocate((20, 30_001), "float32").numpy()
    stream = each_cupy.cuda.Stream(non_blocking=True)
    results = []
    with stream:
        for turn in range(20):
            array.cupy().set(values(comm.rank, 30_001, turn=turn))
            array.cupy()[...] *= 2
            comm.allreduce_async_(array).wait()
            results.append(array.cupy() + 1)
        for row, result in zip(kept, results, strict=True):
            row[:] = result.get()
    for turn, row in enumerate(kept):
        np.testing.assert_array_equal(row, 2 * everybodys(comm.size, 30_001, turn=turn).sum(0) + 1)


def test_many_in_flight(comm):
    memory = comm.allocate((40, 999), "float32", device="cuda")
    rows = [memory.part(memory.dtype, 999 * 4 * row, 999) for row in range(40)]
    for turn in range(3):
        for row, array in enumerate(rows):
            array.cupy().set(values(comm.rank, 999, turn=row + turn))
        handles = [comm.allreduce_async_(array) for array in rows]
        for handle in reversed(handles):
            handle.wait()
        seen = memory.cupy().get()
        for row in range(40):
            np.testing.assert_array_equal(seen[row], everybodys(comm.size, 999, turn=row + turn).sum(0))


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("count", [300_000, 524_288, 1_200_001])
def test_ordinary_arrays_pass_in_pieces(each_cupy, comm, monkeypatch, count):
    monkeypatch.setattr(device_staging, "_MEMORY_NBYTES", 2 << 20)
    array = each_cupy.empty(count, np.float32)
    for turn in range(3):
        array.set(values(comm.rank, count, turn=turn))
        handle = comm.allreduce_async_(array)
        assert "through device memory" in handle.description
        handle.wait()
        array *= 2
        np.testing.assert_array_equal(array.get(), 2 * everybodys(comm.size, count, turn=turn).sum(0))
    result = comm.allreduce(array, op="average")
    np.testing.assert_array_equal(result.get(), array.get())


def test_communicators_of_some_ranks_have_arrays_of_their_own(comm):
    half = comm.split(comm.rank % 2)
    array = filled(half, 100)
    half.allreduce_(array)
    np.testing.assert_array_equal(array.cupy().get(), everybodys(half.size, 100).sum(0))
    half.free()


@pytest.mark.mpi(min_size=2)
def test_ranks_of_different_kinds(comm):
    array = comm.allocate(100, "float32", device=None if comm.rank else "cuda")
    if comm.rank:
        array.numpy()[:] = values(comm.rank, 100)
    else:
        array.cupy().set(values(0, 100))
    comm.allreduce_(array)
    seen = array.numpy() if comm.rank else array.cupy().get()
    np.testing.assert_array_equal(seen, everybodys(comm.size, 100).sum(0))


@pytest.mark.mpi(min_size=2)
def test_memory_comes_and_goes(each_cupy, comm):
    free_before = None
    for turn in range(6):
        array = filled(comm, (1 << 20) + turn)
        comm.allreduce_(array)
        del array
        gc.collect()
        comm.barrier()
        comm.allocate(1, "uint8")
        comm.barrier()
        free_nbytes = each_cupy.cuda.runtime.memGetInfo()[0]
        comm.barrier()
        # What CUDA and CuPy need for themselves comes with the first.
        free_before = free_nbytes if free_before is None else free_before
    assert free_nbytes > free_before - (16 << 20)


@needs_compiler
@pytest.mark.mpi(min_size=2)
def test_slow_device_of_one_rank(fake_cupy):
    comm = Communicator.from_mpi(settings=Settings(wait="sleep"))
    machine = fake_cupy._machine.machine
    for slow in range(comm.size):
        machine.configuration.latency_s = 0.02 if comm.rank == slow else 0.0
        array = filled(comm, 1000)
        comm.allreduce_async_(array).wait()
        np.testing.assert_array_equal(array.cupy().get(), everybodys(comm.size, 1000).sum(0))
    comm.free()
    comm.engine.close()


@pytest.mark.mpi(min_size=2)
def test_one_rank_that_cannot_map_the_others(fake_cupy, caplog):
    comm = Communicator.from_mpi(settings=Settings(wait="sleep"))
    fake_cupy._machine.machine.configuration.can_export = comm.rank != 1
    array = filled(comm, 1000)
    assert not array.is_shared
    comm.allreduce_(array)
    np.testing.assert_array_equal(array.cupy().get(), everybodys(comm.size, 1000).sum(0))
    told = [record.message for record in caplog.records if "cannot be shared" in record.message]
    assert len(told) == (comm.rank == 0)
    comm.free()
    comm.engine.close()


@needs_compiler
@pytest.mark.mpi(min_size=2)
def test_a_rank_that_failed_with_work_in_flight_holds_up_nothing_that_comes_after(fake_cupy, monkeypatch, caplog):
    monkeypatch.setattr(ipc, "_PATIENCE_S", 0.2)
    settings = Settings(wait="sleep")
    first = Communicator.from_mpi(settings=settings)
    is_failing = first.rank == first.size - 1
    count = (1 << 20) + 5

    def both(comm, turn):
        """Reduce an array in device memory that ranks share, and an ordinary one, which passes through such memory."""
        shared = comm.allocate(count, "float32", device="cuda")
        ordinary = fake_cupy.zeros(count, np.float32)
        for array in (shared.cupy(), ordinary):
            array.set(values(comm.rank, count, turn=turn))
        for array in (shared, ordinary):
            comm.allreduce_(array)
        expected = everybodys(comm.size, count, turn=turn).sum(0)
        for array in (shared.cupy(), ordinary):
            np.testing.assert_array_equal(array.get(), expected)
        return shared

    array = both(first, 0)
    with contextlib.ExitStack() as stack:
        if is_failing:
            stack.enter_context(held_up(fake_cupy, array.streams.compute))
        first.barrier()
        # The host is through with it, and the device never will be.
        with fake_cupy.cuda.Stream(non_blocking=True):
            first.allreduce_async_(array).wait()
        assert not array.streams.are_idle
        if is_failing:
            first.revoke("its device hangs")
        assert isinstance(outcome(first.barrier), CommRevokedError)
        second = Communicator.from_mpi(settings=settings)
        second.adopt(first)
        both(second, 1)
        # What it has left cannot be given back, and holds up nobody who tries.
        first.engine.close()
        del first, array
        gc.collect()
        both(second, 2)
        both(second, 3)
        second.barrier()
    second.barrier()
    second.free()
    second.engine.close()
    assert "stay allocated" in caplog.text
