"""Ordinary device arrays that pass through device memory the node shares, by ranks that are threads."""

from __future__ import annotations

import logging

import numpy as np
import pytest

from mpitrain.collectives import device_staging
from tests.support.fake_cupy import stand_in
from tests.support.host_kernels import needs_compiler
from tests.support.ranks import SETTINGS, run_communicators

pytestmark = needs_compiler

# What is larger than half of this is not brought to a meeting.
SMALL = SETTINGS.replace(staging_nbytes=1024)
WAY = "through device memory"


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch):
    monkeypatch.setattr(device_staging, "_MEMORY_NBYTES", 4096)


def values(rank, count, dtype=np.float32):
    return (np.arange(count) % 97 + 100 * rank).astype(dtype)


def everybodys(size, count):
    return np.stack([values(rank, count) for rank in range(size)])


@pytest.mark.parametrize("count", [129, 1023, 1024, 1025, 5000])
@pytest.mark.parametrize("size", [2, 3])
def test_pieces_come_back_in_place(fake_cupy, size, count):
    def body(comm):
        array = fake_cupy.array(values(comm.rank, count))
        comm.allreduce_(array)
        handle = comm.allreduce_async_(array, op="average")
        assert WAY in handle.description
        handle.wait()
        return array.get()

    for result in run_communicators(size, body, settings=SMALL):
        np.testing.assert_array_equal(result, everybodys(size, count).sum(0))
    assert not fake_cupy._machine.machine.num_device_synchronizes


def test_many_at_once_take_turns(fake_cupy):
    def body(comm):
        arrays = [fake_cupy.array(values(comm.rank, 900 + index)) for index in range(12)]
        handles = [comm.allreduce_async_(array) for array in arrays]
        for handle in reversed(handles):
            handle.wait()
        return [array.get() for array in arrays]

    for results in run_communicators(2, body, settings=SMALL):
        for index, result in enumerate(results):
            np.testing.assert_array_equal(result, everybodys(2, 900 + index).sum(0))


def test_small_arrays_and_other_algorithms_go_by_way_of_the_host(fake_cupy):
    def body(comm):
        small = comm.allreduce_async_(fake_cupy.ones(8, np.float32))
        ring = comm.allreduce_async_(fake_cupy.ones(2000, np.float32), algorithm="ring")
        return [(WAY in handle.description, handle.wait().get()[0]) for handle in (small, ring)]

    assert run_communicators(2, body, settings=SMALL) == [[(False, 2), (False, 2)]] * 2


def test_rank_with_an_array_of_the_host_sends_all_by_way_of_the_host(fake_cupy):
    def body(comm):
        mine = values(comm.rank, 2000)
        array = fake_cupy.array(mine) if comm.rank else mine.copy()
        comm.allreduce_(array)
        after = fake_cupy.array(mine)
        handle = comm.allreduce_async_(after)
        handle.wait()
        return (array.get() if comm.rank else array), after.get(), WAY in handle.description

    for mixed, after, is_through_devices in run_communicators(3, body, settings=SMALL):
        np.testing.assert_array_equal(mixed, everybodys(3, 2000).sum(0))
        np.testing.assert_array_equal(after, everybodys(3, 2000).sum(0))
        assert not is_through_devices


def test_memory_that_cannot_be_mapped_sends_all_by_way_of_the_host(caplog):
    with stand_in(can_export=False) as cupy:

        def body(comm):
            arrays = [cupy.array(values(comm.rank, 2000)) for _ in range(3)]
            for handle in [comm.allreduce_async_(array) for array in arrays[:2]]:
                handle.wait()
            comm.allreduce_(arrays[2])
            return [array.get() for array in arrays]

        with caplog.at_level(logging.WARNING, "mpitrain"):
            for results in run_communicators(2, body, settings=SMALL):
                for result in results:
                    np.testing.assert_array_equal(result, everybodys(2, 2000).sum(0))
    told = [record.message for record in caplog.records if WAY in record.message]
    assert len(told) == 1
    assert "cudaErrorNotSupported" in told[0]


def test_memory_goes_with_the_communicator(fake_cupy):
    memory = fake_cupy._machine.machine.memory

    def body(comm):
        comm.allreduce_(fake_cupy.array(values(comm.rank, 2000)))
        comm.barrier()
        during = memory.used_nbytes(0)
        comm.barrier()
        comm.free()
        return during

    during = run_communicators(2, body, settings=SMALL)
    assert memory.used_nbytes(0) <= min(during) - (4 << 20)
