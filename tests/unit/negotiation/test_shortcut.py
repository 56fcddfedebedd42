"""Small all-reduces without an announcement: the same results and errors as with one, whatever other ranks do."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from mpitrain.collectives import Communicator, Handle
from mpitrain.comm import Transport, run_ranks
from mpitrain.config import Settings
from mpitrain.errors import CollectiveMismatchError, CommError, CommRevokedError, CommTimeoutError, RankFailedError
from mpitrain.negotiation import Negotiator
from mpitrain.negotiation import service as service_module
from mpitrain.negotiation.shortcut import Attempt, Shortcut
from tests.support.cases import DTYPES, bits, brought, has_meaning, make, read
from tests.support.clocks import Clock
from tests.support.limits import HANG_S
from tests.support.ranks import outcome

SETTINGS = Settings(wait="sleep")
# Sums are formed in another order.
TOLERANCES = {"float16": 2e-2, "bfloat16": 1e-1}


def run(size: int, function: Callable[[Negotiator], Any], config: Settings = SETTINGS, **world: Any) -> list[Any]:
    def body(transport: Transport) -> Any:
        comm = Communicator(transport, settings=config)
        try:
            return function(Negotiator(comm))
        finally:
            comm.engine.close()

    return run_ranks(size, body, **world)


def start(negotiator: Negotiator, name: str, array: Any, **options: Any) -> Handle[list[Any]]:
    return negotiator.start(name, "allreduce", [array], **{"op": "sum", **options})


def wait(handle: Handle[list[Any]]) -> Any:
    (result,) = handle.wait(HANG_S)
    return result


def reduce(negotiator: Negotiator, name: str, array: Any, **options: Any) -> Any:
    """Reduce as the face does; an array of float64 is made of a number."""
    array = np.array([array], np.float64) if isinstance(array, float | int) else array
    results = negotiator.reduce(name, array, on_start=lambda: None, **{"op": "sum", **options})
    if results is None:
        return wait(start(negotiator, name, array, **options))
    return results[0] if isinstance(results, list) else wait(results)


def takes_shortcut(negotiator: Negotiator, name: str, array: Any, **options: Any) -> bool:
    """Reduce, and tell whether nothing had to be announced."""
    announced: list[Any] = []
    announce = negotiator._in_flight._announce
    negotiator._in_flight._announce = lambda announcement: (announced.append(announcement), announce(announcement))
    reduce(negotiator, name, array, **options)
    negotiator._in_flight._announce = announce
    return not announced


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("op", ["sum", "average", "min", "max", "product"])
def test_results_are_those_of_announced_operations(size: int, op: str) -> None:
    def body(negotiator: Negotiator) -> None:
        rank = negotiator.comm.rank
        for dtype in DTYPES:
            if not has_meaning(op, dtype):
                continue
            factors: dict[str, float] = {"prescale": 0.5, "postscale": 3.0} if dtype == "float64" else {}
            for shape in [(), (1,), (5, 3), (1021,)]:
                array = make(np.asarray(brought(rank, shape, dtype, op)), dtype)
                before = bits(array)
                got = reduce(negotiator, "x", array, op=op, **factors)
                assert bits(array) == before
                want = wait(start(negotiator, "x", array, op=op, **factors))
                assert got.shape == tuple(shape)
                np.testing.assert_allclose(read(got), read(want), rtol=TOLERANCES.get(dtype, 1e-5))
                assert reduce(negotiator, "x", array, op=op, in_place=True, **factors) is array
                assert bits(array) == bits(got)

    run(size, body)


@pytest.mark.parametrize("size", [2, 3])
def test_nothing_is_announced_where_all_ranks_wait_for_the_same(size: int) -> None:
    def body(negotiator: Negotiator) -> list[bool]:
        big = np.ones(Shortcut.most_nbytes(size) // 8 + 1)
        return [
            takes_shortcut(negotiator, "a", np.ones(5)),
            takes_shortcut(negotiator, "b", np.ones((3, 2), np.float16), op="average"),
            takes_shortcut(negotiator, "a", big[1:], op="max"),
            takes_shortcut(negotiator, "a", big),
            takes_shortcut(negotiator, "a", np.ones(0)),
            takes_shortcut(negotiator, "a", np.ones(5), op="adasum"),
            takes_shortcut(negotiator, "a", np.ones(5), in_place=True),
        ]

    want = [True, True, True, False, False, False, True]
    assert run(size, body) == [want] * size


def test_ranks_on_several_nodes_and_without_shared_memory_announce() -> None:
    assert run(2, lambda negotiator: takes_shortcut(negotiator, "a", np.ones(5)), ranks_per_node=1) == [False] * 2
    config = SETTINGS.replace(shared_memory=False)
    assert run(2, lambda negotiator: takes_shortcut(negotiator, "a", np.ones(5)), config) == [False] * 2


@pytest.mark.parametrize("size", [2, 3])
def test_a_group_that_was_given_up_has_no_shortcut(size: int) -> None:
    def body(negotiator: Negotiator) -> list[Any]:
        before = reduce(negotiator, "x", 1.0)[0]
        if negotiator.comm.rank == size - 1:
            negotiator.comm.revoke("test")
        return [before, outcome(lambda: reduce(negotiator, "x", 1.0)), outcome(lambda: reduce(negotiator, "y", 1.0))]

    for before, *errors in run(size, body):
        assert before == size
        assert all(isinstance(error, CommRevokedError) for error in errors), errors


@pytest.mark.parametrize("size", [2, 3, 4])
def test_one_rank_starts_asynchronously_what_the_others_wait_for(size: int) -> None:
    def body(negotiator: Negotiator) -> None:
        for turn in range(3 * size):
            if turn % size == negotiator.comm.rank:
                got = wait(start(negotiator, "x", np.array([1.0])))
            else:
                got = reduce(negotiator, "x", 1.0)
            assert got.tolist() == [size]
            assert reduce(negotiator, "y", 2.0).tolist() == [2 * size]

    run(size, body)


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("seed", range(6))
def test_any_mixture_of_forms(size: int, seed: int) -> None:
    """All ranks start the same operations in order, each in the form of its choice, and wait for some later."""

    def body(negotiator: Negotiator) -> None:
        rank = negotiator.comm.rank
        choice = random.Random(100 * seed + rank)
        eager = choice.random()
        late: list[tuple[int, Handle[list[Any]]]] = []
        for number in range(60):
            value = float(number + rank)
            if choice.random() < eager:
                assert reduce(negotiator, f"x{number}", value).tolist() == [total(number)]
            else:
                late.append((number, start(negotiator, f"x{number}", np.array([value]))))
            while late and choice.random() < 0.6:
                waited, handle = late.pop(choice.randrange(len(late)))
                assert wait(handle).tolist() == [total(waited)]
        for waited, handle in late:
            assert wait(handle).tolist() == [total(waited)]

    def total(number: int) -> float:
        return size * number + size * (size - 1) / 2

    run(size, body)


@pytest.mark.parametrize("size", [2, 3])
def test_several_threads_of_each_rank_that_wait_for_operations_of_their_own(size: int) -> None:
    def body(negotiator: Negotiator) -> None:
        failures: list[BaseException] = []

        def work(lane: int) -> None:
            try:
                for number in range(30):
                    value = float(10 * lane + number + negotiator.comm.rank)
                    want = size * (10 * lane + number) + size * (size - 1) / 2
                    assert reduce(negotiator, f"lane {lane}", value).tolist() == [want]
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=work, args=(lane,), daemon=True) for lane in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(HANG_S)
            assert not thread.is_alive()
        assert failures == []

    run(size, body)


@pytest.mark.parametrize("late", [0, 1, 2])
def test_a_rank_that_comes_late(late: int) -> None:
    def body(negotiator: Negotiator) -> list[float]:
        if negotiator.comm.rank == late:
            # Until the others have waited for longer than they do at once.
            waiting.acquire(timeout=HANG_S)
            waiting.acquire(timeout=HANG_S)
            return reduce(negotiator, "x", 1.0).tolist()
        array = np.array([1.0])
        handle = negotiator.reduce("x", array, op="sum", in_place=True, on_start=lambda: None)
        assert isinstance(handle, Handle)
        with pytest.raises(ValueError, match="same name"):
            start(negotiator, "x", np.array([2.0]))
        waiting.release()
        assert wait(handle) is array
        return array.tolist()

    waiting = threading.Semaphore(0)
    assert run(3, body) == [[3.0]] * 3


def test_a_name_is_held_from_the_moment_at_which_a_rank_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Attempt.is_met_soon

    def paused(attempt: Attempt) -> bool:
        if attempt.name == "x":
            with pytest.raises(ValueError, match="same name"):
                start(negotiators[threading.current_thread()], "x", np.array([2.0]))
        return original(attempt)

    def body(negotiator: Negotiator) -> None:
        negotiators[threading.current_thread()] = negotiator
        assert reduce(negotiator, "x", 1.0).tolist() == [2.0]
        assert not negotiator._in_flight.holds("x")
        assert wait(start(negotiator, "x", np.array([2.0]))).tolist() == [4.0]

    negotiators: dict[threading.Thread, Negotiator] = {}
    monkeypatch.setattr(Attempt, "is_met_soon", paused)
    run(2, body)


@pytest.mark.parametrize("method", ["come", "take", "takes_place"])
def test_an_interrupt_at_any_time_leaves_nobody_waiting(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    original: Any = getattr(Attempt, method)

    def interrupted(attempt: Attempt) -> Any:
        result = original(attempt)
        if threading.current_thread() in interrupted_threads and attempt.name == "x":
            interrupted_threads.clear()
            raise KeyboardInterrupt
        return result

    def body(negotiator: Negotiator) -> None:
        array = np.array([1.0])
        if negotiator.comm.rank == 0:
            interrupted_threads.append(threading.current_thread())
            assert isinstance(outcome_of_all(lambda: reduce(negotiator, "x", array)), KeyboardInterrupt)
        else:
            if method == "takes_place":
                late.wait(0.05)  # longer than the others wait at once
            outcome(lambda: reduce(negotiator, "x", array))
        # Either everything goes on, or the group is closed for all.
        after = outcome(lambda: reduce(negotiator, "y", 1.0).tolist())
        assert after == [2.0] or (isinstance(after, CommError) and "KeyboardInterrupt" in str(after))

    late = threading.Event()
    interrupted_threads: list[threading.Thread] = []
    monkeypatch.setattr(Attempt, method, interrupted)
    run(2, body)


def outcome_of_all(function: Callable[[], object]) -> BaseException | object:
    try:
        return function()
    except BaseException as error:
        return error


def test_different_things_of_one_name_are_an_error_on_all_and_leave_everything_usable() -> None:
    def body(negotiator: Negotiator) -> None:
        rank = negotiator.comm.rank
        for array, options in [(np.ones(2 + rank), {}), (np.ones(2), {"op": ["sum", "max"][rank]})]:
            error = outcome(lambda: reduce(negotiator, "x", array, **options))  # noqa: B023
            assert isinstance(error, CollectiveMismatchError)
            assert reduce(negotiator, "x", 1.0).tolist() == [2.0]

    run(2, body)


def test_different_names_in_different_order_in_threads_that_wait() -> None:
    def body(negotiator: Negotiator) -> None:
        names = ["a", "b"] if negotiator.comm.rank else ["b", "a"]
        results: dict[str, Any] = {}
        threads = [
            threading.Thread(target=lambda name=name: results.update({name: reduce(negotiator, name, 1.0)}))
            for name in names
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(HANG_S)
        assert {name: result.tolist() for name, result in results.items()} == {"a": [2.0], "b": [2.0]}

    for _ in range(5):
        run(2, body)


@pytest.mark.parametrize("size", [2, 3])
def test_what_has_no_meaning_is_the_same_error_on_all(size: int) -> None:
    def body(negotiator: Negotiator) -> None:
        for _ in range(3):
            with pytest.raises(ValueError, match="must be finite for int32"):
                reduce(negotiator, "x", np.ones(2, np.int32), prescale=float("inf"))
            assert reduce(negotiator, "x", 1.0).tolist() == [size]

    run(size, body)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("others", ["meet", "announce"])
def test_an_interrupted_operation_goes_on(size: int, others: str, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Attempt.is_met_soon

    def interrupted(attempt: Attempt) -> bool:
        if attempt.name == "x" and threading.current_thread() is interrupted_thread[0]:
            raise KeyboardInterrupt
        return original(attempt)

    def body(negotiator: Negotiator) -> None:
        array = np.array([1.0])
        if negotiator.comm.rank == 0:
            interrupted_thread.append(threading.current_thread())
            with pytest.raises(KeyboardInterrupt):
                reduce(negotiator, "x", array, in_place=True)
            is_interrupted.set()
            negotiator.await_name("x")
            assert array.tolist() == [size]
        else:
            assert is_interrupted.wait(HANG_S)
            if others == "meet":
                assert reduce(negotiator, "x", array).tolist() == [size]
            else:
                assert wait(start(negotiator, "x", array)).tolist() == [size]
        assert reduce(negotiator, "y", 1.0).tolist() == [size]

    interrupted_thread: list[threading.Thread] = []
    is_interrupted = threading.Event()
    monkeypatch.setattr(Attempt, "is_met_soon", interrupted)
    run(size, body)


@pytest.mark.parametrize("leaving", [0, 1, 2])
def test_who_waits_for_a_rank_that_leaves_gets_an_error(leaving: int) -> None:
    def body(negotiator: Negotiator) -> None:
        assert reduce(negotiator, "x", 1.0).tolist() == [3.0]
        if negotiator.comm.rank == leaving:
            negotiator.leave("has had enough")
            return
        error = outcome(lambda: reduce(negotiator, "y", 1.0))
        assert isinstance(error, RankFailedError)
        assert f"rank {leaving} has had enough" in str(error)
        assert isinstance(outcome(lambda: reduce(negotiator, "z", 1.0)), RankFailedError)

    run(3, body)


def test_a_rank_that_has_joined_takes_part_with_what_changes_nothing() -> None:
    def body(negotiator: Negotiator) -> None:
        for epoch in range(3):
            for batch in range(2 + negotiator.comm.rank):
                size = 3 - max(0, batch - 1)
                assert reduce(negotiator, "x", 1.0).tolist() == [size]
            assert negotiator.join(lambda step: None).wait(HANG_S) == [2]
            assert reduce(negotiator, f"end of {epoch}", 1.0).tolist() == [3.0]

    run(3, body)


@pytest.mark.parametrize("early", [0, 1])
@pytest.mark.parametrize("form", [reduce, lambda *arguments: wait(start(*arguments))])
def test_a_rank_that_joins_while_another_thread_waits_does_not_overtake_it(
    early: int, form: Callable[..., Any]
) -> None:
    is_waiting = threading.Event()

    def body(negotiator: Negotiator) -> list[float]:
        if negotiator.comm.rank != early:
            is_waiting.wait(HANG_S)
            result = form(negotiator, "x", np.array([2.0]))
            negotiator.join(lambda step: None).wait(HANG_S)
            return list(result)
        results: list[float] = []
        waiter = threading.Thread(target=lambda: results.extend(reduce(negotiator, "x", 1.0)), daemon=True)
        waiter.start()
        assert negotiator._shortcut is not None
        while negotiator._shortcut.meeting.visitor is None:
            time.sleep(1e-3)
        # The other one sees, at the earliest, that this rank is about to join.
        threading.Timer(0.05, is_waiting.set).start()
        negotiator.join(lambda step: None).wait(HANG_S)
        waiter.join(HANG_S)
        return results

    assert run(2, body) == [[3.0], [3.0]]


def test_a_rank_that_joins_after_its_operation_has_failed_learns_why() -> None:
    def body(negotiator: Negotiator) -> list[Any]:
        if negotiator.comm.rank:
            negotiator.leave("has had enough")
            return []
        return [
            outcome(lambda: reduce(negotiator, "x", 1.0)),
            outcome(lambda: negotiator.join(lambda step: None).wait(HANG_S)),
        ]

    errors, _ = run(2, body)
    assert all(isinstance(error, RankFailedError) for error in errors), errors


@pytest.mark.parametrize("missing", [0, 2])
def test_an_end_after_a_set_time(missing: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock goes when the others have come."""

    class ClockOfOthers(Clock):
        def monotonic(self) -> float:
            if all(meeting.visitor for meeting in meetings) and len(meetings) == 2 and not self._end_s:
                self.go(2000.0)
            return super().monotonic()

    def body(negotiator: Negotiator) -> None:
        shortcut = negotiator._shortcut
        assert shortcut is not None
        if negotiator.comm.rank == missing:
            assert is_over.wait(HANG_S)
        else:
            meetings.append(shortcut.meeting)
            error = outcome(lambda: reduce(negotiator, "x", 1.0))
            is_over.set()
            assert isinstance(error, CommTimeoutError)
            assert f"x was not started by ranks [{missing}] within 1000 s" in str(error)
            assert "or raise MPITRAIN_STALL_SHUTDOWN_S" in str(error)
        assert isinstance(outcome(lambda: reduce(negotiator, "y", 1.0)), CommTimeoutError)

    meetings: list[Any] = []
    is_over = threading.Event()
    monkeypatch.setattr(service_module, "time", ClockOfOthers())
    run(3, body, SETTINGS.replace(stall_shutdown_s=1000.0))


def test_no_room_for_the_result_is_said_before_others_count_on_this_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    from mpitrain.negotiation import shortcut as shortcut_module

    def body(negotiator: Negotiator) -> None:
        started: list[bool] = []
        if negotiator.comm.rank == 0:
            poor.append(threading.current_thread())
            with pytest.raises(MemoryError):
                negotiator.reduce("x", np.ones(3), op="sum", on_start=lambda: started.append(True))
            assert not started
            negotiator.refuse("x", "allreduce", "MemoryError: no room")
        else:
            error = outcome(lambda: reduce(negotiator, "x", np.ones(3)))
            assert isinstance(error, CollectiveMismatchError)
            assert "no room" in str(error)
        assert wait(start(negotiator, "y", np.ones(1))).tolist() == [2.0]

    def starved(array: Any, shape: Any) -> Any:
        if threading.current_thread() in poor:
            raise MemoryError("no room")
        return original(array, shape)

    poor: list[threading.Thread] = []
    original = shortcut_module.allocate_like
    monkeypatch.setattr(shortcut_module, "allocate_like", starved)
    run(2, body)
