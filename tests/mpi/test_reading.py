"""Ordinary arrays of some megabytes, which ranks read from each other's memory: real processes, real sizes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mpitrain.collectives import Communicator
from mpitrain.collectives.selection import LEAST_READ_NBYTES
from mpitrain.config import Settings

COUNT = LEAST_READ_NBYTES // 4 + 100_003


@pytest.fixture(scope="module", params=[True, False], ids=["read", "staged"])
def comm(request):
    comm = Communicator.from_mpi(settings=Settings(wait="sleep", cross_memory=request.param))
    yield comm
    comm.free()
    comm.engine.close()


def content(rank, dtype="float32"):
    return ((np.arange(COUNT) * (rank + 2) + 3 * rank) % 31).astype(dtype)


def wanted(size, dtype="float32"):
    return sum(content(rank, "int64") for rank in range(size)).astype(dtype)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("algorithm", ["direct", "auto", "native"])
@pytest.mark.parametrize("dtype", ["float32", "int64", "float16"])
def test_sums_are_exact_in_every_form(comm, algorithm, dtype):
    mine, want = content(comm.rank, dtype), wanted(comm.size, dtype)
    for _ in range(3):
        results = [comm.allreduce(mine, algorithm=algorithm)]
        in_place, tensor = mine.copy(), torch.from_numpy(mine.copy())
        handles = [comm.allreduce_async_(each, algorithm=algorithm) for each in (in_place, tensor)]
        handles += [comm.allreduce_async(mine, algorithm=algorithm) for _ in range(2)]
        results.append(comm.allreduce_(mine.copy(), algorithm=algorithm))
        results += [handle.wait() for handle in handles]
        for result in results:
            np.testing.assert_array_equal(np.asarray(result), want)
    np.testing.assert_array_equal(mine, content(comm.rank, dtype))


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("algorithm", ["direct", "native"])
def test_ranks_may_call_different_forms(comm, algorithm):
    mine, want = content(comm.rank), wanted(comm.size)
    for turn in range(4 * comm.size):
        form = (turn // 4 + comm.rank) % comm.size if turn % 4 else 0
        if form == 0:
            result = comm.allreduce(mine, algorithm=algorithm)
        elif form == 1:
            result = comm.allreduce_(mine.copy(), algorithm=algorithm)
        else:
            result = comm.allreduce(np.repeat(mine, 2)[::2], algorithm=algorithm)
        np.testing.assert_array_equal(result, want)
    np.testing.assert_array_equal(mine, content(comm.rank))


@pytest.mark.mpi(min_size=2)
def test_averages_have_the_same_bits_on_all_ranks_and_by_both_ways(comm):
    mine = np.random.default_rng(comm.rank).standard_normal(COUNT).astype(np.float32)
    other = comm.duplicate(comm.settings.replace(cross_memory=not comm.settings.cross_memory))
    results = [each.allreduce(mine, op="average", algorithm="direct") for each in (comm, other)]
    other.free()
    assert results[0].tobytes() == results[1].tobytes()
    assert len({hash(each) for each in comm.allgather_obj(results[0].tobytes())}) == 1


@pytest.mark.mpi(min_size=2)
def test_an_array_may_go_at_once_when_the_call_has_returned(comm):
    # Others must not read what the caller has changed, or given back to the system.
    for turn in range(10):
        array = np.full(COUNT, comm.rank + turn, np.float32)
        total = comm.allreduce(array, algorithm="direct")
        array[:] = -1e9
        del array
        assert (total == comm.size * turn + comm.size * (comm.size - 1) // 2).all()
        total[:] = -1e9
        del total
