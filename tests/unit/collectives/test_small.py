"""Small all-reduces and the meeting of a node's ranks that carries them."""

from __future__ import annotations

import operator
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import mpitrain
from mpitrain.collectives import Communicator, Handle
from mpitrain.collectives.small import SmallAllreduce
from mpitrain.config import Settings
from mpitrain.errors import CollectiveMismatchError, CommError, CommRevokedError, MpitrainError
from tests.support.limits import HANG_S
from tests.support.ranks import outcome, run_communicators

# Slots of 4 KiB.
SETTINGS = Settings(wait="sleep", staging_nbytes=8192)


def content(rank: int, count: int, dtype: str) -> np.ndarray:
    """Different by rank and by index, and small enough that every sum is exact."""
    return ((np.arange(count) * (rank + 2) + 3 * rank) % 31).astype(dtype)


@pytest.mark.parametrize("size", [2, 3, 5])
@pytest.mark.parametrize("dtype", ["float32", "int16", "float16"])
def test_every_way_gives_the_sum_again_and_again(size: int, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # So that both kinds occur: every rank reduces all, and each a slice.
    monkeypatch.setattr("mpitrain.collectives.small.MOST_READ_NBYTES", 300)

    def body(comm: Communicator) -> list[np.ndarray]:
        results = []
        for count in (0, 1, 7, 64, 333, 5000):
            plan_array = np.empty(count, dtype)
            plan = comm.plan_allreduce_(plan_array, algorithm="direct")
            for _ in range(3):
                array = content(comm.rank, count, dtype)
                before = array.copy()
                assert comm.allreduce_(array, algorithm="direct") is array
                copied = comm.allreduce(before, algorithm="direct")
                assert np.array_equal(before, content(comm.rank, count, dtype))
                plan_array[:] = before
                assert plan.run() is plan_array
                tensor = torch.from_numpy(before.copy())
                assert comm.allreduce_(tensor, algorithm="direct") is tensor
                new = comm.allreduce(torch.from_numpy(before), algorithm="direct")
                shared = comm.allocate(count, dtype)
                shared.numpy()[:] = before
                assert comm.allreduce_(shared, algorithm="direct") is shared
                results += [array, copied, plan_array.copy(), tensor.numpy(), new.numpy(), shared.numpy().copy()]
                comm.barrier()
        return results

    by_rank = run_communicators(size, body, settings=SETTINGS)
    for index, result in enumerate(by_rank[0]):
        parts = [content(rank, result.size, dtype).astype(np.float64) for rank in range(size)]
        assert np.array_equal(result, sum(parts).astype(dtype))
        assert all(np.array_equal(result, other[index]) for other in by_rank)


@pytest.mark.parametrize("op", ["average", "min", "max", "product"])
def test_shapes_and_operations_of_calls_seen_before(op: str) -> None:
    def body(comm: Communicator) -> list[np.ndarray]:
        results = []
        for shape in ((), (3,), (2, 3), (2, 0)):
            for _ in range(2):
                array = np.full(shape, comm.rank + 1.5)
                results.append(comm.allreduce(array, op=op, algorithm="direct"))
                assert comm.allreduce_(array, op=op, algorithm="direct").shape == shape
        return results

    expected = {"average": 2.5, "min": 1.5, "max": 3.5, "product": 1.5 * 2.5 * 3.5}[op]
    for results in run_communicators(3, body, settings=SETTINGS):
        assert [result.shape for result in results[::2]] == [(), (3,), (2, 3), (2, 0)]
        assert all(np.allclose(result, expected) for result in results)


def test_ranks_may_go_different_ways() -> None:
    """What one rank has seen before another may call in other words, or with another kind of array."""

    def body(comm: Communicator) -> list[float]:
        words = [{"op": "sum"}, {"op": 1, "algorithm": "direct"}, {"op": "sum", "algorithm": "direct"}]
        results = []
        for turn in range(6):
            array = np.full(5, float(comm.rank + turn))
            options = words[(turn + comm.rank) % 3]
            both = torch.from_numpy(array) if (turn + comm.rank) % 2 else array
            results.append(float(comm.allreduce_(both, **options)[0]))
        return results

    # Only "direct" may be chosen, so that "auto" is the same.
    settings = SETTINGS.replace(algorithm="direct")
    for results in run_communicators(3, body, settings=settings):
        assert results == [3.0 * turn + 3.0 for turn in range(6)]


def test_mismatch_after_calls_seen_before_leaves_the_communicator_usable() -> None:
    def body(comm: Communicator) -> tuple[object, float]:
        for count in (3, 4):
            comm.allreduce_(np.zeros(count), algorithm="direct")
        error = outcome(lambda: comm.allreduce_(np.zeros(3 + comm.rank % 2), algorithm="direct"))
        return error, float(comm.allreduce_(np.ones(3), algorithm="direct")[0])

    for error, total in run_communicators(3, body, settings=SETTINGS):
        assert isinstance(error, CollectiveMismatchError)
        assert "[3]" in str(error)
        assert "[4]" in str(error)
        assert total == 3.0


def test_bad_argument_meets_a_call_seen_before() -> None:
    def body(comm: Communicator) -> object:
        comm.allreduce_(np.zeros((3, 2)), algorithm="direct")
        # Not contiguous on rank 0, although it looks the same.
        array = np.zeros((2, 3)).T if comm.rank == 0 else np.zeros((3, 2))
        return outcome(lambda: comm.allreduce_(array, algorithm="direct"))

    first, *others = run_communicators(3, body, settings=SETTINGS)
    assert isinstance(first, ValueError)
    assert "contiguous" in str(first)
    assert all(isinstance(error, CollectiveMismatchError) for error in others)
    assert all("contiguous" in str(error) for error in others)


def test_whoever_waits_learns_that_a_rank_gave_up() -> None:
    def body(comm: Communicator) -> object:
        comm.allreduce_(np.zeros(3), algorithm="direct")
        if comm.rank == 1:
            comm.revoke("out of work")
            return outcome(lambda: comm.allreduce_(np.zeros(3), algorithm="direct"))
        return outcome(lambda: comm.allreduce_(np.zeros(3), algorithm="direct"))

    for error in run_communicators(3, body, settings=SETTINGS):
        assert isinstance(error, CommRevokedError)
        assert "rank 1: out of work" in str(error)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("shape", [(), (1,), (0, 3), (2, 3, 5)])
@pytest.mark.parametrize(
    ("op", "dtype", "expected"),
    [
        ("sum", "float32", sum),
        ("average", "int64", lambda parts: sum(parts) // len(parts)),
        ("average", "float16", lambda parts: (sum(part.astype("f4") for part in parts) / len(parts)).astype("f2")),
        ("max", "float64", lambda parts: np.max(parts, axis=0)),
        ("min", "uint8", lambda parts: np.min(parts, axis=0)),
        ("product", "int32", lambda parts: np.prod(parts, axis=0)),
        ("sum", "bool", lambda parts: np.any(parts, axis=0)),
    ],
)
def test_calls_like_one_before_keep_shape_and_meaning(
    size: int, shape: tuple[int, ...], op: str, dtype: str, expected: Callable[[list[np.ndarray]], np.ndarray]
) -> None:
    parts = [content(rank, int(np.prod(shape)), dtype).reshape(shape) for rank in range(size)]

    def body(comm: Communicator) -> None:
        for _ in range(3):
            array = parts[comm.rank].copy()
            result = comm.allreduce(array, op=op)
            np.testing.assert_array_equal(array, parts[comm.rank])
            returned = comm.allreduce_(array, op=op)
            assert returned is array
            for each in (result, array):
                assert type(each) is np.ndarray
                assert (each.shape, each.dtype) == (shape, np.dtype(dtype))
                np.testing.assert_array_equal(each, expected(parts))
        known = [comm._quick.of_arrays, comm._quick.of_arrays_in_place]
        assert [len(each) for each in known] == [1, 1]

    run_communicators(size, body, settings=SETTINGS)


def test_whoever_waits_learns_that_a_rank_left() -> None:
    def body(comm: Communicator) -> object:
        comm.allreduce_(np.zeros(3), algorithm="direct")
        if comm.rank == 2:
            comm.leave("is done")
            return None
        return outcome(lambda: comm.allreduce_(np.zeros(3), algorithm="direct"))

    *errors, _ = run_communicators(3, body, settings=SETTINGS)
    for error in errors:
        assert isinstance(error, MpitrainError)
        assert "rank 2" in str(error)


def test_a_failure_on_the_way_gives_the_communicator_up(monkeypatch: pytest.MonkeyPatch) -> None:
    reducers = SmallAllreduce.reducers

    def fail(_total: object) -> None:
        raise ZeroDivisionError

    def reducers_of_rank_0_fail(small: SmallAllreduce, shape: tuple[int, ...]) -> list[Callable[..., Any]]:
        return [fail, fail] if small._meeting.rank == 0 else reducers(small, shape)

    monkeypatch.setattr(SmallAllreduce, "reducers", reducers_of_rank_0_fail)

    def body(comm: Communicator) -> object:
        array = np.zeros(3)
        comm.allreduce_(array, algorithm="direct")
        first = outcome(lambda: comm.allreduce_(array, algorithm="direct"))
        second = outcome(lambda: comm.allreduce_(array, algorithm="direct"))
        return first, second

    (first, second), (_, other) = run_communicators(2, body, settings=SETTINGS)
    assert isinstance(first, ZeroDivisionError)
    assert isinstance(second, CommRevokedError)
    assert isinstance(other, CommRevokedError)


def test_a_freed_communicator_refuses_calls() -> None:
    def body(comm: Communicator) -> tuple[object, object]:
        other = comm.duplicate()
        array = np.zeros(3)
        other.allreduce_(array, algorithm="direct")
        plan = other.plan_allreduce_(array, algorithm="direct")
        other.free()
        return outcome(lambda: other.allreduce_(array, algorithm="direct")), outcome(plan.run)

    for errors in run_communicators(2, body, settings=SETTINGS):
        for error in errors:
            assert isinstance(error, CommRevokedError)
            assert "freed" in str(error)


def test_in_place_and_not_are_kept_apart() -> None:
    """A shared array above what every rank reduces whole is copied in one form, and left where it lies in the other."""

    def body(comm: Communicator) -> list[float]:
        shared = comm.allocate(400, "float32")
        results = []
        for turn in range(3):
            shared.numpy()[:] = comm.rank + turn
            op = "sum" if (comm.rank + turn) % 2 else 1
            results.append(float(comm.allreduce(shared, op=op, algorithm="direct").numpy()[0]))
            comm.allreduce_(shared, op="sum", algorithm="direct")
            results.append(float(shared.numpy()[-1]))
        return results

    settings = Settings(wait="sleep", staging_nbytes=8192)
    for results in run_communicators(2, body, settings=settings):
        assert results == [1.0, 1.0, 3.0, 3.0, 5.0, 5.0]


@pytest.mark.parametrize("count", [3, 600])
def test_a_rank_that_leaves_while_it_waits_is_an_error_on_every_rank(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its program ends in one thread, while another waits in a call for a rank that is late."""
    monkeypatch.setattr("mpitrain.collectives.small.MOST_READ_NBYTES", 300)
    errors: list[object] = []

    def body(comm: Communicator) -> object:
        array = np.zeros(count)
        comm.allreduce_(array, algorithm="direct")

        def wait() -> None:
            errors.append(outcome(lambda: comm.allreduce_(array, algorithm="direct")))

        if comm.rank == 2:
            while len(errors) < 2:
                time.sleep(0.01)
        thread = threading.Thread(target=wait, daemon=True)
        thread.start()
        if comm.rank == 1:
            time.sleep(0.1)
            comm.leave("has finished early")
        thread.join(HANG_S)
        return None

    run_communicators(3, body, settings=SETTINGS)
    # To the late one a small array is there already.
    waited, late = errors[:2], errors[2:]
    for error in waited if count == 3 else waited + late:
        assert isinstance(error, CommError), errors
        assert "has finished early" in str(error)
    assert len(late) == 1


LACKS = {
    "a first call": ("mpitrain.collectives.operations.allreduce.copy_of", "allreduce", False),
    "an asynchronous call": ("mpitrain.collectives.operations.allreduce.copy_of", "allreduce_async", True),
    "a result": ("mpitrain.collectives.operations.allgather.allocate_like", "allgather", True),
}


@pytest.mark.parametrize(
    ("lack", "kind"),
    [(lack, MemoryError) for lack in LACKS] + [("a first call", KeyboardInterrupt), ("a result", KeyboardInterrupt)],
)
@pytest.mark.parametrize("check", [True, False])
def test_memory_that_one_rank_lacks_is_an_error_on_every_rank(
    lack: str, kind: type[BaseException], check: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    where, form, has_been_seen = LACKS[lack]
    poor: list[int] = []
    for place in {where, "mpitrain.collectives.operations.allreduce.copy_of"}:
        original = operator.attrgetter(place.removeprefix("mpitrain."))(mpitrain)

        def lacking(*arguments: Any, original: Any = original, **options: Any) -> Any:
            if threading.get_ident() in poor:
                raise kind("out of memory")
            return original(*arguments, **options)

        monkeypatch.setattr(place, lacking)

    def called(comm: Communicator) -> object:
        result = getattr(comm, form)(np.ones(3), algorithm="direct")
        return result.wait(HANG_S) if isinstance(result, Handle) else result

    def body(comm: Communicator) -> tuple[BaseException, object]:
        if has_been_seen:
            called(comm)
        comm.barrier()
        if comm.rank == 1:
            poor.append(threading.get_ident())
        with pytest.raises((MpitrainError, kind)) as caught:
            called(comm)
        poor.clear()
        return caught.value, outcome(lambda: called(comm))

    first, (own, _), third = run_communicators(3, body, settings=SETTINGS.replace(check=check))
    assert type(own) is kind
    for error, following in (first, third):
        assert isinstance(error, MpitrainError), error
        assert "out of memory" in str(error)
        is_usable = check and kind is MemoryError
        assert isinstance(following, np.ndarray) if is_usable else isinstance(following, CommRevokedError)


def test_memory_that_one_rank_lacks_for_a_result_ends_the_next_call_of_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A small result is made after the exchange, with which the call is over elsewhere."""
    poor: list[int] = []
    empty_like = np.empty_like

    def lacking(*arguments: Any, **options: Any) -> Any:
        if threading.get_ident() in poor:
            raise MemoryError("out of memory")
        return empty_like(*arguments, **options)

    monkeypatch.setattr("mpitrain.collectives.reduction.np.empty_like", lacking)

    def body(comm: Communicator) -> list[object]:
        comm.allreduce(np.ones(3), algorithm="direct")
        comm.barrier()
        if comm.rank == 1:
            poor.append(threading.get_ident())
        outcomes = [outcome(lambda: comm.allreduce(np.ones(3), algorithm="direct")) for _ in range(2)]
        poor.clear()
        return outcomes

    first, own, third = run_communicators(3, body, settings=SETTINGS)
    assert isinstance(own[0], MemoryError)
    for outcomes in (first, third):
        assert isinstance(outcomes[1], CommRevokedError)
        assert "out of memory" in str(outcomes[1])


@pytest.mark.parametrize("kind", ["a tensor", "a shared array"])
def test_memory_that_one_rank_lacks_for_a_copy_of_what_is_no_numpy_array_is_an_error_on_every_rank(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    poor: list[int] = []
    for place in ("mpitrain.collectives.quick_calls.copy_of", "mpitrain.collectives.operations.allreduce.copy_of"):

        def lacking(array: Any) -> Any:
            if threading.get_ident() in poor:
                raise MemoryError("out of memory")
            return mpitrain.memory.copy_of(array)

        monkeypatch.setattr(place, lacking)

    def body(comm: Communicator) -> list[object]:
        array = torch.ones(3) if kind == "a tensor" else comm.allocate(3, "float32")

        def call() -> object:
            return comm.allreduce(array, algorithm="direct")

        call()
        comm.barrier()
        if comm.rank == 1:
            poor.append(threading.get_ident())
        first = outcome(call)
        poor.clear()
        return [first, outcome(call)]

    results = run_communicators(3, body, settings=SETTINGS)
    for rank, (first, second) in enumerate(results):
        assert isinstance(first, MemoryError if rank == 1 else CollectiveMismatchError), first
        assert "out of memory" in str(first)
        assert not isinstance(second, BaseException), second
