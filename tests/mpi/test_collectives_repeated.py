"""All-reduces like one before, which need no plan: by MPI's own, and beside what goes the general way."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from mpitrain.collectives import Communicator
from mpitrain.collectives.quick_native import QuickNative
from mpitrain.config import Settings
from mpitrain.errors import CollectiveMismatchError
from tests.support.ranks import outcome

SHAPES = [(), (1,), (0, 3), (7, 3, 5), (70_001,)]


@pytest.fixture
def comm():
    comm = Communicator.from_mpi(settings=Settings(wait="sleep"))
    yield comm
    comm.free()
    comm.engine.close()


def content(rank: int, shape: tuple[int, ...], dtype: str, turn: int = 0) -> np.ndarray:
    """Different by rank, index and turn, and small enough that every sum is exact."""
    index = np.arange(int(np.prod(shape)))
    return ((index * (rank + 2) + 3 * rank + turn) % 31).astype(dtype).reshape(shape)


@pytest.mark.parametrize(
    ("op", "dtype"),
    [("sum", "float32"), ("average", "float16"), ("average", "int64"), ("max", "float64"), ("product", "bool")],
)
def test_repeated_native_calls_keep_shape_and_meaning(comm, op, dtype):
    for shape, turn in itertools.product(SHAPES, range(3)):
        parts = [content(rank, shape, dtype, turn) for rank in range(comm.size)]
        total = sum(part.astype("float64") for part in parts)
        if op == "average":
            total = total / comm.size if dtype == "float16" else total // comm.size
        expected = {"max": np.max, "product": np.all}[op](parts, axis=0) if op in ("max", "product") else total
        array = parts[comm.rank].copy()
        result = comm.allreduce(array, op=op, algorithm="native")
        np.testing.assert_array_equal(array, parts[comm.rank])
        assert comm.allreduce_(array, op=op, algorithm="native") is array
        for each in (result, array):
            assert (type(each), each.shape, each.dtype) == (np.ndarray, shape, np.dtype(dtype))
            np.testing.assert_array_equal(each, np.asarray(expected).astype(dtype))
    known = [*comm._quick.of_arrays.values(), *comm._quick.of_arrays_in_place.values()]
    assert [type(quick) for quick in known] == ([QuickNative] * 2 * len(SHAPES) if comm.size > 1 else [])


@pytest.mark.parametrize("algorithm", ["native", "auto"])
def test_a_new_result_is_contiguous_however_the_array_lies(comm, algorithm):
    for turn, transpose in enumerate([False, True, True, False]):
        parts = [content(rank, (30, 7), "float32", turn) for rank in range(comm.size)]
        mine = np.asfortranarray(parts[comm.rank]) if transpose else parts[comm.rank].copy()
        mine.flags.writeable = False
        result = comm.allreduce(mine, algorithm=algorithm)
        assert result.flags.carray
        np.testing.assert_array_equal(result, sum(parts))


@pytest.mark.mpi(min_size=2)
def test_ranks_may_go_different_ways_in_the_same_call(comm):
    """A tensor here and an array there, one like before and one not."""
    for turn in range(6):
        data = content(comm.rank, (300,), "float32", turn)
        is_tensor = (turn + comm.rank) % 3 == 0
        if turn == 3 and comm.rank == 1:
            comm._quick.of_arrays_in_place.clear()
        array = torch.from_numpy(data.copy()) if is_tensor else data.copy()
        comm.allreduce_(array, algorithm="native")
        expected = sum(content(rank, (300,), "float32", turn) for rank in range(comm.size))
        np.testing.assert_array_equal(np.asarray(array), expected)


@pytest.mark.mpi(min_size=2)
def test_a_mismatch_of_repeated_calls_is_an_error_on_every_rank_and_gives_the_turn_back(comm):
    arrays = [np.ones(count) for count in (300, 301)]
    for array in arrays:
        comm.allreduce_(array, algorithm="native")
    for turn in range(3):
        caught = outcome(lambda array=arrays[comm.rank == turn % comm.size]: comm.allreduce_(array, algorithm="native"))
        assert isinstance(caught, CollectiveMismatchError), caught
        assert "[300]" in str(caught)
        assert "[301]" in str(caught)
        # Of the same kind, which would wait for ever for a turn that nobody has given back.
        handle = comm.allreduce_async(np.full(5, comm.rank), algorithm="native")
        assert comm.allreduce(arrays[0], algorithm="native")[0] == arrays[0][0] * comm.size
        assert handle.wait()[0] == sum(range(comm.size))


@pytest.mark.mpi(min_size=2)
def test_repeated_calls_wait_for_the_turn_of_those_in_flight(comm):
    array = np.ones(1000)
    comm.allreduce_(array, algorithm="native")
    for turn in range(5):
        handles = [comm.allreduce_async(content(comm.rank, (50,), "int64", k), algorithm="native") for k in range(4)]
        array[:] = content(comm.rank, (1000,), "float64", turn)
        comm.allreduce_(array, algorithm="native")
        np.testing.assert_array_equal(array, sum(content(r, (1000,), "float64", turn) for r in range(comm.size)))
        for k, handle in enumerate(handles):
            expected = sum(content(r, (50,), "int64", k) for r in range(comm.size))
            np.testing.assert_array_equal(handle.wait(), expected)


@pytest.mark.mpi(min_size=2)
def test_a_rank_that_gives_up_ends_the_wait_of_repeated_native_calls(comm):
    duplicate = comm.duplicate()
    array = np.ones(1000)
    duplicate.allreduce_(array, algorithm="native")
    if comm.rank == 0:
        duplicate.revoke("out of work")
    else:
        caught = outcome(lambda: duplicate.allreduce_(array, algorithm="native"))
        assert "out of work" in str(caught)
    comm.barrier()


def test_a_time_limit_holds_for_repeated_native_calls(comm):
    limited = comm.duplicate(comm.settings.replace(timeout_s=30.0))
    for _ in range(3):
        limited.allreduce_(np.ones(1000), algorithm="native")
    assert not limited._quick.of_arrays_in_place  # they go the way on which waiting can end
    limited.free()


@pytest.mark.mpi(min_size=2)
def test_no_room_for_a_result_is_a_matter_of_the_general_way(comm, monkeypatch):
    array = content(comm.rank, (1000,), "float64")
    expected = sum(content(rank, (1000,), "float64") for rank in range(comm.size))
    comm.allreduce(array, algorithm="native")
    if comm.rank == 1:

        def lacking(*_arguments):
            raise MemoryError("out of memory")

        monkeypatch.setattr("mpitrain.collectives.quick.np.empty", lacking)
        monkeypatch.setattr("mpitrain.collectives.operations.allreduce.copy_of", lacking)
    caught = outcome(lambda: comm.allreduce(array, algorithm="native"))
    assert isinstance(caught, MemoryError if comm.rank == 1 else CollectiveMismatchError), caught
    assert "out of memory" in str(caught)
    monkeypatch.undo()
    np.testing.assert_array_equal(comm.allreduce(array, algorithm="native"), expected)


@pytest.mark.mpi(min_size=2)
def test_repeated_native_calls_count_as_time_held_up(comm):
    array = np.ones(1 << 20)
    comm.allreduce_(array, algorithm="native")
    before = comm.engine.counters
    comm.allreduce_(array, algorithm="native")
    after = comm.engine.counters
    assert after.operations - before.operations == 1
    assert after.nbytes - before.nbytes == array.nbytes
    assert after.exposed_s > before.exposed_s
