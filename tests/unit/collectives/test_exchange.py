"""Direct collectives of one exchange, on every way that what is brought can take."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mpitrain.collectives import Communicator
from mpitrain.config import Settings
from mpitrain.errors import CollectiveMismatchError
from tests.support.limits import HANG_S
from tests.support.ranks import outcome, run_communicators

# Pieces of 256 bytes, and slots of 512.
SETTINGS = Settings(wait="sleep", staging_nbytes=1024)
WAYS = ["blocking", "async", "shared", "shared async"]
COUNTS = [0, 1, 7, 64, 1001]


def content(rank: int, count: int) -> np.ndarray:
    """Different by rank and by index, and small enough that every sum is exact."""
    return ((np.arange(count) * (rank + 2) + 3 * rank) % 31).astype(np.float32)


def total(size: int, count: int) -> np.ndarray:
    return np.sum([content(rank, count) for rank in range(size)], axis=0, dtype=np.float32)


def call(comm: Communicator, way: str, collective: str, data: np.ndarray, **options: Any) -> Any:
    """Run a collective the given way; return its result as an array, or None."""
    array: Any = data.copy()
    if "shared" in way:
        array = comm.allocate(data.shape, data.dtype)
        array.numpy()[...] = data
    if "async" in way:
        result = getattr(comm, collective.replace("_in_place", "_async_") + "_async" * ("in_place" not in collective))(
            array, algorithm="direct", **options
        ).wait(HANG_S)
    else:
        result = getattr(comm, collective.replace("_in_place", "_"))(array, algorithm="direct", **options)
    if result is None:
        return None
    # A rank that leaves frees what others still read, were it not for the end of the operation.
    return result.numpy().copy() if "shared" in way else result


@pytest.mark.parametrize("size", [2, 3, 5])
@pytest.mark.parametrize("way", WAYS)
def test_all_collectives_of_one_exchange(size: int, way: str) -> None:
    def body(comm: Communicator) -> list[tuple[Any, ...]]:
        results = []
        for count in COUNTS:
            root = count % size
            data = content(comm.rank, count)
            results.append(
                (
                    call(comm, way, "broadcast", data, root=root),
                    call(comm, way, "broadcast_in_place", data, root=root),
                    call(comm, way, "reduce", data, root=root),
                    call(comm, way, "allgather", data),
                    call(comm, way, "reduce_scatter", data),
                )
            )
        return results

    for rank, results in enumerate(run_communicators(size, body, settings=SETTINGS)):
        for count, (copied, in_place, reduced, gathered, scattered) in zip(COUNTS, results, strict=True):
            root = count % size
            assert np.array_equal(copied, content(root, count))
            assert np.array_equal(in_place, content(root, count))
            assert (reduced is None) == (rank != root)
            if rank == root:
                assert np.array_equal(reduced, total(size, count))
            assert np.array_equal(gathered, np.concatenate([content(each, count) for each in range(size)]))
            assert np.array_equal(scattered, np.array_split(total(size, count), size)[rank])


@pytest.mark.parametrize("way", ["blocking", "async"])
def test_rows_may_differ_and_shapes_are_kept(way: str) -> None:
    rows = [3, 0, 40, 1]

    def body(comm: Communicator) -> tuple[np.ndarray, np.ndarray]:
        data = content(comm.rank, rows[comm.rank] * 6).reshape(rows[comm.rank], 3, 2)
        gathered = call(comm, way, "allgather", data, rows=rows)
        scattered = call(comm, way, "reduce_scatter", content(comm.rank, 7 * 2).reshape(7, 2), op="average")
        return gathered, scattered

    everything = np.concatenate([content(rank, rows[rank] * 6).reshape(-1, 3, 2) for rank in range(4)])
    average = (total(4, 14) / np.float32(4)).reshape(7, 2)
    for rank, (gathered, scattered) in enumerate(run_communicators(4, body, settings=SETTINGS)):
        assert np.array_equal(gathered, everything)
        assert np.array_equal(scattered, np.array_split(average, 4)[rank])


def test_shared_here_and_ordinary_there_is_an_error_on_all_ranks() -> None:
    def body(comm: Communicator) -> object:
        shared = comm.allocate(9, "float32")
        array = shared if comm.rank == 1 else np.zeros(9, np.float32)
        return outcome(lambda: comm.reduce(array, root=0, algorithm="direct"))

    for error in run_communicators(3, body, settings=SETTINGS):
        assert isinstance(error, CollectiveMismatchError)
        assert "in shared memory" in str(error)


def test_many_operations_in_flight_take_turns_with_the_staging_memory() -> None:
    def body(comm: Communicator) -> list[np.ndarray]:
        handles = [
            comm.allgather_async(content(comm.rank + index, 100 + index), algorithm="direct") for index in range(20)
        ]
        last = comm.allreduce(content(comm.rank, 900), algorithm="direct")
        return [*(handle.wait(HANG_S) for handle in handles), last]

    for *gathered, last in run_communicators(3, body, settings=SETTINGS):
        for index, result in enumerate(gathered):
            parts = [content(rank + index, 100 + index) for rank in range(3)]
            assert np.array_equal(result, np.concatenate(parts))
        assert np.array_equal(last, total(3, 900))


def test_more_operations_in_flight_than_flags_have_slots() -> None:
    def body(comm: Communicator) -> list[float]:
        buffers = [comm.allocate(8, "float32") for _ in range(3)]
        for buffer in buffers:
            buffer.numpy()[:] = comm.rank
        handles = [comm.allreduce_async(buffers[index % 3], algorithm="direct") for index in range(300)]
        handles += [comm.reduce_async(buffers[index % 3], algorithm="direct") for index in range(300)]
        # Quick calls take numbers as well.
        results = [float(comm.allreduce_(np.full(2, float(turn)), algorithm="direct")[0]) for turn in range(300)]
        for handle in handles:
            handle.wait(HANG_S)
        return results

    for results in run_communicators(2, body, settings=SETTINGS):
        assert results == [2.0 * turn for turn in range(300)]


def test_tiny_staging_memory_has_room_for_every_owner() -> None:
    def body(comm: Communicator) -> np.ndarray:
        return call(comm, "async", "reduce_scatter", content(comm.rank, 101).astype(np.float64))

    for rank, result in enumerate(run_communicators(3, body, settings=Settings(wait="sleep", staging_nbytes=24))):
        assert np.array_equal(result, np.array_split(total(3, 101), 3)[rank])
