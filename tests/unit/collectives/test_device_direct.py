"""All-reduce in device memory that ranks share, by ranks that are threads; `tests/mpi/test_device.py` has processes."""

from __future__ import annotations

import functools
import gc
import time

import numpy as np
import pytest

from mpitrain.errors import CollectiveMismatchError, UnavailableError
from mpitrain.memory import SharedDeviceArray
from mpitrain.memory.device import load_cupy
from tests.support.fake_cupy import stand_in
from tests.support.host_kernels import needs_compiler
from tests.support.ranks import SETTINGS, outcome, run_communicators

pytestmark = needs_compiler

COUNTS = [0, 1, 5, 64, 1000, 70001]


def values(rank, count, dtype=np.float32):
    """Sums of these are exact, and different for every rank and index."""
    return (np.arange(count) % 97 + 100 * rank).astype(dtype)


def total(size, count, dtype=np.float32):
    return functools.reduce(np.add, [values(rank, count, dtype) for rank in range(size)])


def filled(comm, count, dtype="float32"):
    array = comm.allocate(count, dtype, device="cuda")
    array.cupy().set(values(comm.rank, count, dtype))
    return array


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_every_rank_gets_the_sum(fake_cupy, size, count):
    def body(comm):
        array = filled(comm, count)
        assert isinstance(array, SharedDeviceArray)
        assert array.is_shared == (size > 1)
        assert comm.allreduce_(array) is array
        return array.cupy().get().tolist()

    assert run_communicators(size, body) == [total(size, count).tolist()] * size


@pytest.mark.parametrize("blocking", [True, False])
@pytest.mark.parametrize(
    ("op", "dtype", "expected"),
    [
        ("average", "float64", lambda arrays: np.mean(arrays, 0)),
        ("max", "int32", lambda arrays: np.max(arrays, 0)),
        ("min", "float32", lambda arrays: np.min(arrays, 0)),
        ("sum", "float16", lambda arrays: np.sum(arrays, 0, np.float32).astype(np.float16)),
    ],
)
def test_operations_and_dtypes(fake_cupy, op, dtype, expected, blocking):
    def body(comm):
        array = filled(comm, 1003, dtype)
        if blocking:
            comm.allreduce_(array, op=op)
        else:
            comm.allreduce_async_(array, op=op).wait()
        return array.cupy().get()

    results = run_communicators(3, body)
    wanted = expected(np.stack([values(rank, 1003, dtype) for rank in range(3)]))
    for result in results:
        np.testing.assert_array_equal(result, wanted)


def test_nobody_waits_for_the_device(fake_cupy):
    """Asynchronous calls end for the host while the device has done nothing; what is queued then comes after them."""
    machine = fake_cupy._machine.machine
    size = 2

    def body(comm):
        arrays = [filled(comm, 300 + index) for index in range(4)]
        fake_cupy.cuda.Stream.null.synchronize()
        comm.barrier()
        machine.hold(True)
        comm.barrier()
        for array in arrays:
            array.cupy()[...] *= 2
        handles = [comm.allreduce_async_(array) for array in arrays]
        for handle in handles:
            handle.wait()
        results = [array.cupy() + 1 for array in arrays]
        for array in arrays:
            assert array.cupy()._host.tolist() == values(comm.rank, array.shape[0]).tolist()
        comm.barrier()
        machine.hold(False)
        return [result.get().tolist() for result in results]

    expected = [(2 * total(size, 300 + index) + 1).tolist() for index in range(4)]
    assert run_communicators(size, body) == [expected] * size
    assert not machine.num_device_synchronizes


def test_many_operations_in_flight_take_turns_with_the_events(fake_cupy):
    def body(comm):
        memory = comm.allocate((50, 100), "float32", device="cuda")
        rows = [memory.part(memory.dtype, 400 * row, 100) for row in range(50)]
        for turn in range(3):
            for row, array in enumerate(rows):
                array.cupy()[...] = comm.rank + row + turn
            handles = [comm.allreduce_async_(array) for array in rows]
            for handle in reversed(handles):
                handle.wait()
        return memory.cupy().get()[:, 7].tolist()

    assert run_communicators(3, body) == [[3 + 3 * (row + 2) for row in range(50)]] * 3


@pytest.mark.parametrize("late", [0, 1])
def test_rank_that_comes_late_is_waited_for(fake_cupy, late):
    def body(comm):
        array = filled(comm, 5000)
        if comm.rank == late:
            time.sleep(0.05)
            array.cupy()[...] *= 3
        comm.allreduce_(array)
        return array.cupy().get()

    expected = values(0, 5000) + values(1, 5000) + 2 * values(late, 5000)
    for result in run_communicators(2, body):
        np.testing.assert_array_equal(result, expected)


def test_persistent_plan_runs_many_times(fake_cupy):
    def body(comm):
        array = filled(comm, 130)
        plan = comm.plan_allreduce_(array, op="average")
        assert "by direct in device memory" in plan.description
        for _ in range(3):
            array.cupy()[...] += comm.rank
            plan.run()
            array.cupy()[...] += comm.rank
            plan.start().wait()
        return array.cupy().get()

    expected = np.mean([values(0, 130), values(1, 130)], 0) + 3.0
    for result in run_communicators(2, body):
        np.testing.assert_array_equal(result, expected.astype(np.float32))


@pytest.mark.parametrize("ranks_per_node", [1, 2, 3])
@pytest.mark.parametrize("count", [3, 1000, 2 << 20])
def test_hierarchical(fake_cupy, ranks_per_node, count):
    def body(comm):
        array = filled(comm, count)
        comm.allreduce_(array, op="average")
        return array.cupy().get()

    size = 4
    expected = (total(size, count) / size).astype(np.float32)
    for result in run_communicators(size, body, ranks_per_node=ranks_per_node):
        np.testing.assert_array_equal(result, expected)


def test_ranks_with_devices_of_their_own():
    with stand_in(num_devices=3):

        def body(comm):
            array = filled(comm, 777)
            assert array.device_name == f"cuda:{comm.rank}"
            comm.allreduce_(array)
            with load_cupy("test").cuda.Device(array.device):
                return array.cupy().get().tolist()

        assert run_communicators(3, body) == [total(3, 777).tolist()] * 3


def test_where_nothing_can_be_mapped_it_goes_through_the_host(caplog):
    with stand_in(can_export=False):

        def body(comm):
            array = filled(comm, 100)
            assert not array.is_shared
            comm.allreduce_(array)
            return array.cupy().get().tolist()

        assert run_communicators(2, body) == [total(2, 100).tolist()] * 2
    warnings = [record.message for record in caplog.records if "device memory" in record.message]
    assert len(warnings) == 1
    assert "going on with private memory and copies through the host" in warnings[0]


def test_ranks_on_the_host_and_on_devices(fake_cupy):
    def body(comm):
        array = comm.allocate(100, "float32", device=None if comm.rank else "cuda")
        assert not array.is_shared
        if comm.rank:
            array.numpy()[:] = values(comm.rank, 100)
        else:
            array.cupy().set(values(comm.rank, 100))
        comm.allreduce_(array)
        return (array.numpy() if comm.rank else array.cupy().get()).tolist()

    assert run_communicators(3, body) == [total(3, 100).tolist()] * 3


def test_named_algorithm_and_adasum_go_another_way(fake_cupy):
    def body(comm):
        array = filled(comm, 64)
        comm.allreduce_(array, algorithm="ring")
        ring = array.cupy().get().tolist()
        array.cupy().set(np.ones(64, np.float32))
        comm.allreduce_(array, op="adasum")
        return ring, array.cupy().get().tolist()

    assert run_communicators(2, body) == [(total(2, 64).tolist(), [1.0] * 64)] * 2


@pytest.mark.parametrize(
    ("device", "error"),
    [
        ("cpu", r"must be on CUDA, got 'cpu'; pass"),
        ("cuda:x", r"must be on CUDA"),
        (1, r"local rank 0 has cuda:0, got 1; pass that one, or 'cuda'"),
    ],
)
def test_bad_device_of_one_rank_is_an_error_on_all(fake_cupy, device, error):
    def body(comm):
        with pytest.raises(UnavailableError, match=rf"^allocate: rank 0 has no such device \(device: {error}"):
            comm.allocate(10, "float32", device="cuda" if comm.rank else device)

    run_communicators(2, body)


def test_different_shapes_are_a_mismatch(fake_cupy):
    def body(comm):
        memory = comm.allocate(10, "float32", device="cuda")
        part = memory.part(memory.dtype, 0, 5 + comm.rank)
        error = outcome(lambda: comm.allreduce_(part))
        comm.allreduce_(memory)
        return error

    assert all(isinstance(error, CollectiveMismatchError) for error in run_communicators(2, body))


def test_memory_is_given_back_when_all_ranks_are_done_with_it(fake_cupy):
    memory = fake_cupy._machine.machine.memory

    def body(comm):
        before = memory.used_nbytes(0)
        array = comm.allocate(8 << 20, "uint8", device="cuda")
        comm.allreduce_(array)
        kept = array.cupy()
        comm.barrier()
        during = memory.used_nbytes(0)
        del array
        gc.collect()
        comm.barrier()
        comm.allocate(1, "uint8")
        comm.barrier()
        with_view = memory.used_nbytes(0)
        comm.barrier()
        del kept
        gc.collect()
        comm.barrier()
        return before, during, with_view, memory.used_nbytes(0)

    for before, during, with_view, after in run_communicators(2, body, settings=SETTINGS):
        assert during - before == with_view - before == 16 << 20
        assert after == before
