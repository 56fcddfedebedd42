"""All-reduce by ranks that read each other's memory, with in-process ranks on pretended nodes."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mpitrain.collectives import Communicator, direct, node, quick_ordinary, reading
from mpitrain.collectives.node import Flags
from mpitrain.collectives.progress import drive
from mpitrain.collectives.reading import read_allreduce
from mpitrain.collectives.reduction import Reduction
from mpitrain.comm import ThreadTransport, run_ranks
from mpitrain.errors import CollectiveError, CollectiveMismatchError, CommError
from mpitrain.memory import CrossMemory, ReduceOp, address_of, can_read, dtype_named, make_sample
from tests.support.limits import HANG_S
from tests.support.ranks import SETTINGS, outcome, run_communicators
from tests.unit.collectives.test_direct import CASES, content, expected, group


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    if not can_read([make_sample()]):
        pytest.skip("this system has no cross memory attach")
    for module in (reading, quick_ordinary):
        monkeypatch.setattr(module, "LEAST_READ_NBYTES", 1)
    monkeypatch.setattr(node, "_BLOCK_NBYTES", 1024)
    monkeypatch.setattr(node, "_LEAST_BLOCK_NBYTES", 256)
    monkeypatch.setattr(reading, "_RESULT_NBYTES", 512)


@pytest.mark.parametrize(("size", "ranks_per_node"), [(1, 1), *CASES])
@pytest.mark.parametrize("count", [1, 15, 1000, 5003])
@pytest.mark.parametrize(
    ("name", "op"),
    [
        ("float32", ReduceOp.SUM),
        ("int64", ReduceOp.MAX),
        ("float64", ReduceOp.AVERAGE),
        ("float16", ReduceOp.AVERAGE),
    ],
)
def test_arrays_are_reduced_in_place_and_into_others(
    size: int, ranks_per_node: int, count: int, name: str, op: ReduceOp
) -> None:
    dtype = dtype_named(name)

    def run(transport: ThreadTransport) -> list[np.ndarray]:
        place, across = group(transport, 4 * 1024)
        reduction = Reduction(dtype, op, size)
        source = content(transport.rank, count, dtype.storage)
        kept, target = source.copy(), np.zeros_like(source)
        for number in (1, 2):
            assert drive(read_allreduce(place, source, target, reduction, number, across=across), spin=False)
            assert np.array_equal(source, kept)
        assert drive(read_allreduce(place, source, source, reduction, 3, across=across), spin=False)
        return [target, source]

    want = expected(size, count, name, op)
    for results in run_ranks(size, run, ranks_per_node=ranks_per_node):
        for result in results:
            if name == "float16":  # content counts bits of it, which mean small numbers
                assert np.array_equal(result, results[0])
            else:
                np.testing.assert_allclose(result, want, rtol=1e-15)


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
@pytest.mark.parametrize(("size", "ranks_per_node"), [(2, 2), (4, 4), (6, 3), (5, 2), (7, 3)])
def test_bits_are_those_of_staged_arrays(size: int, ranks_per_node: int, name: str) -> None:
    # Also where some nodes read memory and others do not.
    dtype = dtype_named(name)
    count = 3001

    def run(transport: ThreadTransport) -> set[bytes]:
        place, across = group(transport, 4 * 1024)
        reduction = Reduction(dtype, ReduceOp.AVERAGE, size)
        random = np.random.default_rng(transport.rank).standard_normal(count).astype(np.float32)
        random = (random.view(np.uint32) >> 16).astype(np.uint16) if name == "bfloat16" else random
        results = set()
        for number, stages in enumerate([False, transport.rank < ranks_per_node, True], start=1):
            array = random.copy()
            if stages:
                drive(direct.staged_allreduce(place, array, reduction, number, across), spin=False)
            else:
                assert drive(
                    read_allreduce(place, array, array, reduction, number, across=across),
                    spin=False,
                )
            results.add(array.tobytes())
        return results

    assert len(set().union(*run_ranks(size, run, ranks_per_node=ranks_per_node))) == 1


def test_an_array_that_cannot_be_read_on_one_rank_is_read_on_none(monkeypatch: pytest.MonkeyPatch) -> None:
    reduction = Reduction(dtype_named("int32"), ReduceOp.SUM, 3)

    def run(transport: ThreadTransport) -> tuple[bool, np.ndarray]:
        place, across = group(transport, 4 * 1024)
        array = content(transport.rank, 100, np.dtype(np.int32))
        done = drive(read_allreduce(place, array, array, reduction, 1, across=across), spin=False)
        return done, array

    show = CrossMemory.readable_address
    hidden = content(1, 100, np.dtype(np.int32))
    monkeypatch.setattr(
        CrossMemory, "readable_address", staticmethod(lambda array: 0 if np.array_equal(array, hidden) else show(array))
    )
    for rank, (done, array) in enumerate(run_ranks(3, run)):
        assert not done
        assert np.array_equal(array, content(rank, 100, np.dtype(np.int32)))

    # A communicator takes the other way then.
    small = SETTINGS.replace(staging_nbytes=1024, check=True)
    want = expected(3, 5000, "int32", ReduceOp.SUM)
    hidden = content(1, 5000, np.dtype(np.int32))
    for results in run_communicators(3, lambda comm: _reduced_in_every_form(comm, 5000, np.int32), settings=small):
        for result in results:
            np.testing.assert_array_equal(result, want)


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("cross_memory", [True, False])
def test_every_form_of_a_call_gives_the_same(size: int, check: bool, cross_memory: bool) -> None:
    settings = SETTINGS.replace(staging_nbytes=1024, check=check, cross_memory=cross_memory)
    want = expected(size, 5003, "float64", ReduceOp.SUM)

    def body(comm: Communicator) -> list[np.ndarray]:
        return _reduced_in_every_form(comm, 5003, np.float64)

    for results in run_communicators(size, body, settings=settings):
        for result in results:
            np.testing.assert_array_equal(result, want)


def _reduced_in_every_form(comm: Communicator, count: int, dtype: Any) -> list[np.ndarray]:
    """All-reduce the content of this rank in every form, several of them at once, and more than once."""
    mine = content(comm.rank, count, np.dtype(dtype))
    results = []
    for _ in range(3):
        results.append(comm.allreduce(mine, algorithm="direct"))
        array = mine.copy()
        handles = [comm.allreduce_async(mine, algorithm="direct") for _ in range(3)]
        handles.append(comm.allreduce_async_(array, algorithm="direct"))
        # One rank goes the general way, as its array has gaps.
        apart = np.zeros((count, 1 + comm.rank % 2), dtype)[:, :1]
        apart[:, 0] = mine
        results.append(comm.allreduce(apart, algorithm="direct")[:, 0])
        results += [handle.wait() for handle in handles]
        tensor = torch.from_numpy(mine.copy())
        comm.allreduce_(tensor, algorithm="direct")
        results += [array, tensor.numpy(), comm.allreduce(torch.from_numpy(mine), algorithm="direct").numpy()]
    assert np.array_equal(mine, content(comm.rank, count, np.dtype(dtype)))
    return results


def test_different_arrays_are_a_mismatch_on_every_rank() -> None:
    def body(comm: Communicator) -> list[Any]:
        def reduce(count: int) -> Any:
            return outcome(lambda: comm.allreduce_(np.ones(count)).sum())

        return [reduce(4000), reduce(4000 + comm.rank), reduce(4000)]

    for before, mismatch, after in run_communicators(2, body, settings=SETTINGS.replace(staging_nbytes=1024)):
        assert isinstance(mismatch, CollectiveMismatchError)
        assert before == after == 8000


def test_memory_that_is_gone_is_an_error_on_every_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    is_gone = threading.Event()
    read = CrossMemory.read

    def fail(memory: CrossMemory, rank: int, *arguments: int) -> None:
        if is_gone.is_set() and rank == 1:
            raise CommError("memory of rank 1 of this node: cannot be read (No such process); it may have ended")
        read(memory, rank, *arguments)

    monkeypatch.setattr(CrossMemory, "read", fail)

    def body(comm: Communicator) -> list[Any]:
        array = np.ones(5000)
        comm.allreduce_(array, algorithm="direct")
        comm.barrier()
        is_gone.set()
        return [outcome(lambda: comm.allreduce_(array, algorithm="direct")) for _ in range(2)]

    for first, second in run_communicators(3, body, settings=SETTINGS.replace(staging_nbytes=1024), timeout_s=HANG_S):
        assert isinstance(first, CollectiveError)
        assert isinstance(second, CollectiveError)


@pytest.mark.parametrize("is_recorded", [False, True])
def test_a_rank_that_is_interrupted_while_others_read_its_array(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, is_recorded: bool
) -> None:
    """It changes its array at once; no other rank returns what it has read too late."""
    is_changed, is_interrupted = threading.Event(), threading.Event()
    read, reached = CrossMemory.read, Flags.reached
    results: dict[int, int] = {}

    def read_late(memory: CrossMemory, rank: int, source: int, target: int, nbytes: int) -> None:
        # What rank 0 has reduced, and rank 1 takes.
        if is_interrupted.is_set() and rank == 0 and source == results[0]:
            is_changed.wait(HANG_S)
        read(memory, rank, source, target, nbytes)

    def interrupt(flags: Flags, phase: int, number: int, part: int = 0) -> bool:
        if is_interrupted.is_set() and phase == direct.EMPTIED and threading.current_thread() is first[0]:
            raise KeyboardInterrupt
        return reached(flags, phase, number, part)

    monkeypatch.setattr(CrossMemory, "read", read_late)
    monkeypatch.setattr(Flags, "reached", interrupt)
    first: list[threading.Thread] = []

    def body(comm: Communicator) -> BaseException | None:
        array = np.ones(5000)
        comm.allreduce_(array, algorithm="direct")
        if is_recorded:
            comm.timeline.start(tmp_path / "timeline.json")
        results[comm.rank] = address_of(array)
        if comm.rank == 0:
            first.append(threading.current_thread())
        comm.barrier()
        is_interrupted.set()
        try:
            comm.allreduce_(array, algorithm="direct")
        except (KeyboardInterrupt, CollectiveError) as error:
            array[:] = -77
            is_changed.set()
            return error
        finally:
            if is_recorded:
                comm.timeline.stop()
        return None

    interrupted, other = run_communicators(2, body, settings=SETTINGS.replace(staging_nbytes=1024))
    assert isinstance(interrupted, KeyboardInterrupt)
    assert isinstance(other, CommError)
