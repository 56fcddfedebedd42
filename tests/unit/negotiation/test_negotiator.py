"""Named operations among ranks that are threads: any order, errors everywhere, and no waiting in vain."""

from __future__ import annotations

import gc
import logging
import random
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpitrain.collectives import Communicator, Handle
from mpitrain.comm import Transport, run_ranks
from mpitrain.config import Settings
from mpitrain.errors import (
    CollectiveError,
    CollectiveMismatchError,
    CommError,
    CommTimeoutError,
    RankFailedError,
)
from mpitrain.negotiation import Negotiator
from mpitrain.negotiation import dialogue as dialogue_module
from mpitrain.negotiation import negotiator as negotiator_module
from mpitrain.negotiation import service as service_module
from mpitrain.negotiation import stalls as stalls_module
from tests.support.clocks import Clock
from tests.support.limits import HANG_S

SETTINGS = Settings(wait="sleep")


def run(size: int, function: Callable[[Negotiator], Any], config: Settings = SETTINGS) -> list[Any]:
    def body(transport: Transport) -> Any:
        comm = Communicator(transport, settings=config)
        try:
            return function(Negotiator(comm))
        finally:
            comm.engine.close()

    return run_ranks(size, body)


def start(negotiator: Negotiator, name: str, array: Any, **options: Any) -> Handle[list[Any]]:
    options.setdefault("op", "sum")
    return negotiator.start(name, "allreduce", [np.asarray(array, np.float64)], **options)


def wait(handle: Handle[list[Any]]) -> Any:
    (result,) = handle.wait(HANG_S)
    return result


def error_of(handle: Handle[list[Any]]) -> Exception:
    with pytest.raises(CollectiveError) as caught:
        handle.wait(HANG_S)
    return caught.value


def total(size: int, factor: float = 1.0) -> float:
    return factor * size * (size + 1) / 2


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_opposite_orders(size: int) -> None:
    def body(negotiator: Negotiator) -> list[float]:
        own = negotiator.comm.rank + 1.0
        names = [f"n{index}" for index in range(6)]
        if negotiator.comm.rank % 2:
            names.reverse()
        handles = {name: start(negotiator, name, [own * int(name[1:])]) for name in names}
        # Waited for in the opposite order, too.
        return [float(wait(handles[name])[0]) for name in reversed(names)]

    for rank, results in enumerate(run(size, body)):
        expected = [total(size, index) for index in range(6)]
        assert results == (expected if rank % 2 else expected[::-1])


@settings(max_examples=15)
@given(seed=st.integers(0, 2**32), size=st.integers(2, 5), fusion_nbytes=st.sampled_from([1, 64, 1 << 20]))
def test_random_orders_collectives_and_delays(seed: int, size: int, fusion_nbytes: int) -> None:
    def body(negotiator: Negotiator) -> None:
        rank = negotiator.comm.rank
        draw = random.Random(f"{seed} {rank}")
        pending = list(range(12))
        draw.shuffle(pending)
        handles: list[tuple[int, Any]] = []
        while pending or handles:
            if pending and (not handles or draw.random() < 0.7):
                index = pending.pop()
                handles.append((index, start_any(negotiator, index)))
            if draw.random() < 0.3:
                time.sleep(draw.random() * 1e-3)
            # Waiting for one before all are started could wait for a rank that waits for another one.
            if not pending:
                index, handle = handles.pop(draw.randrange(len(handles)))
                result = wait(handle)
                if index % 3 == 2:
                    result, rows = result
                    assert rows == list(range(size))
                np.testing.assert_array_equal(result, expected(index, size, rank))

    run(size, body, SETTINGS.replace(fusion_nbytes=fusion_nbytes))


def start_any(negotiator: Negotiator, index: int) -> Handle[list[Any]]:
    rank = negotiator.comm.rank
    name = f"n{index}"
    if index % 3 == 0:
        return start(negotiator, name, np.arange(index) + rank)
    if index % 3 == 1:
        return negotiator.start(name, "broadcast", [np.full(index, rank)], root=index % negotiator.comm.size)
    return negotiator.start(name, "allgather", [np.full((rank, index), rank)])


def expected(index: int, size: int, rank: int) -> Any:
    if index % 3 == 0:
        return np.arange(index) * size + sum(range(size))
    if index % 3 == 1:
        return np.full(index, index % size)
    return np.concatenate([np.full((source, index), source) for source in range(size)])


def test_many_in_flight_are_fused_and_each_gets_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    decided: list[int] = []
    original = service_module.run_decision

    def counted(comm: Communicator, decision: Any, entries: Any) -> Any:
        decided.append(len(decision.names))
        return original(comm, decision, entries)

    monkeypatch.setattr(service_module, "run_decision", counted)

    def body(negotiator: Negotiator) -> None:
        own = negotiator.comm.rank + 1.0
        arrays = [np.full(1 + index % 7, own * index) for index in range(300)]
        handles = [
            negotiator.start(f"n{index}", "allreduce", [array], op="sum", in_place=index % 2 == 0)
            for index, array in enumerate(arrays)
        ]
        for index, (array, handle) in enumerate(zip(arrays, handles, strict=True)):
            result = wait(handle)
            np.testing.assert_array_equal(result, np.full(1 + index % 7, total(3, index)))
            assert (result is array) == (index % 2 == 0)
            if index % 2:
                np.testing.assert_array_equal(array, np.full(1 + index % 7, own * index))

    run(3, body)
    assert sum(decided) == 900
    assert max(decided) > 1


def test_name_in_flight_is_refused_and_may_be_used_again_afterwards() -> None:
    def body(negotiator: Negotiator) -> None:
        own = [negotiator.comm.rank + 1.0]
        if negotiator.comm.rank == 0:
            # The other rank does not start it yet, so it cannot have ended.
            handle = start(negotiator, "a", own)
            with pytest.raises(ValueError, match=r"same name as another tensor .* 'a'; wait for that one"):
                start(negotiator, "a", own)
            gate.set()
        else:
            assert gate.wait(HANG_S)
            handle = start(negotiator, "a", own)
        assert wait(handle) == [3.0]
        for _ in range(20):
            assert wait(start(negotiator, "a", own)) == [3.0]

    gate = threading.Event()
    run(2, body)


@pytest.mark.parametrize("late", [0, 1])
def test_mismatch_is_an_error_on_every_rank_and_all_stays_usable(late: int) -> None:
    def body(negotiator: Negotiator) -> str:
        rank = negotiator.comm.rank
        good = start(negotiator, "good", [rank + 1.0])
        if rank == late:
            time.sleep(0.05)
        error = error_of(start(negotiator, "bad", np.zeros(2 + (rank == 1))))
        assert isinstance(error, CollectiveMismatchError)
        assert wait(good) == [6.0]
        assert wait(start(negotiator, "bad", [rank + 1.0])) == [6.0]
        return str(error)

    texts = set(run(3, body))
    (text,) = texts
    assert text.split("\n")[1:] == [f"  rank {rank}: allreduce sum of float64 [{2 + (rank == 1)}]" for rank in range(3)]


def test_a_meaningless_reduction_is_the_same_error_on_every_rank() -> None:
    def body(negotiator: Negotiator) -> None:
        array = np.array([True, False])
        handle = negotiator.start("a", "allreduce", [array], op="average", in_place=True)
        with pytest.raises(TypeError, match="average is not defined for this dtype, got bool"):
            handle.wait(HANG_S)
        assert array.tolist() == [True, False]
        assert wait(start(negotiator, "b", [1.0])) == [2.0]

    run(2, body)


@pytest.mark.parametrize("leaver", [0, 1, 2])
def test_a_rank_that_leaves_ends_the_waiting_of_all_others(leaver: int) -> None:
    def body(negotiator: Negotiator) -> str:
        if negotiator.comm.rank == leaver:
            time.sleep(0.02)
            negotiator.leave("has gone fishing")
            return ""
        first = error_of(start(negotiator, "a", [1.0]))
        second = error_of(start(negotiator, "b", [1.0]))
        assert isinstance(first, RankFailedError)
        assert isinstance(second, RankFailedError)
        return f"{first} {second}"

    texts = run(3, body)
    assert texts.pop(leaver) == ""
    for text in texts:
        assert text.count(f"rank {leaver} has gone fishing") == 2


def test_leaving_ends_what_is_in_flight_here() -> None:
    def body(negotiator: Negotiator) -> None:
        if negotiator.comm.rank == 0:
            handle = start(negotiator, "never started elsewhere", [1.0])
            negotiator.leave("has shut down")
            assert "this rank has shut down" in str(error_of(handle))
            assert "this rank has shut down" in str(error_of(start(negotiator, "later", [1.0])))

    run(2, body)


def test_what_was_decided_before_a_rank_left_completes() -> None:
    def body(negotiator: Negotiator) -> float:
        handle = start(negotiator, "a", [negotiator.comm.rank + 1.0])
        result = float(wait(handle)[0])
        negotiator.leave("has finished")
        return result

    for _ in range(20):
        assert run(3, body) == [6.0] * 3


def test_two_groups_do_not_wait_for_each_other() -> None:
    def body(negotiator: Negotiator) -> float:
        rank = negotiator.comm.rank
        part = negotiator.group.split(rank % 2)
        assert part is not None
        own = Negotiator(part)
        everybody = start(negotiator, "all", [1.0]) if rank % 2 else None
        if rank % 2:
            # The even ranks have not started "all"; neither that nor their own group keeps this one waiting.
            result = float(wait(start(own, "a", [rank]))[0])
            odd_is_done.set()
        else:
            assert odd_is_done.wait(HANG_S)
            result = float(wait(start(own, "a", [rank]))[0])
            everybody = start(negotiator, "all", [1.0])
        assert everybody is not None
        assert wait(everybody) == [4.0]
        return result

    odd_is_done = threading.Event()
    assert run(4, body) == [2.0, 4.0, 2.0, 4.0]


def test_idle_ranks_neither_send_nor_compute() -> None:
    def body(negotiator: Negotiator) -> int:
        assert wait(start(negotiator, "a", [1.0])) == [2.0]
        together.wait(HANG_S)
        if negotiator.comm.rank == 0:
            time.sleep(0.2)  # whatever the last operation left behind
            used_s[0] = time.process_time()
            time.sleep(0.5)
            used_s[0] = time.process_time() - used_s[0]
        together.wait(HANG_S)
        return sum(map(len, negotiator.comm.transport.world.notices.values()))

    together = threading.Barrier(2)
    used_s = [0.0]
    before, after = run(2, body)
    assert before == after == 0
    assert used_s[0] < 0.1


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Tell the negotiation how late it is; what moves messages has a clock of its own."""
    by_hand = Clock()
    for module in (negotiator_module, service_module, dialogue_module):
        monkeypatch.setattr(module, "time", by_hand)
    return by_hand


class Lateness:
    """Lets the clock go when rank 0 knows that as many ranks as will do so have started an operation."""

    def __init__(self, clock: Clock, name: str, number: int) -> None:
        self._clock, self._name, self._number = clock, name, number
        self._coordinators: list[Any] = []

    def take_part(self, negotiator: Negotiator) -> None:
        """Called by rank 0 before it waits, and by rank 1 when it has started the operation."""
        if negotiator.comm.rank == 0:
            self._coordinators.append(negotiator._dialogue._coordinator)
        if negotiator.comm.rank == 1:
            deadline_s = time.monotonic() + HANG_S
            while not self._is_known():
                assert time.monotonic() < deadline_s
                time.sleep(0.001)
            self._clock.go(1500.0)

    def _is_known(self) -> bool:
        pending = self._coordinators[0]._pending.get(self._name) if self._coordinators else None
        return pending is not None and len(pending.announcements) == self._number


def test_time_limit_names_operation_and_missing_ranks_and_ends_everything(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Rank 0 has all the time to say so.
    monkeypatch.setattr(stalls_module, "_GRACE_S", 1e9)

    def body(negotiator: Negotiator) -> None:
        if negotiator.comm.rank == 2:
            assert others_have_failed.wait(HANG_S)
            error = error_of(start(negotiator, "a", [1.0]))
        else:
            handle = start(negotiator, "a", [1.0])
            lateness.take_part(negotiator)
            error = error_of(handle)
            together.wait(HANG_S)
            others_have_failed.set()
        assert isinstance(error, CommTimeoutError)
        assert "a was not started by ranks [2] within 1000 s" in str(error)
        # A later operation of that name does not meet what is left of this one.
        assert isinstance(error_of(start(negotiator, "a", [1.0])), CommTimeoutError)

    lateness = Lateness(clock, "a", 2)
    others_have_failed = threading.Event()
    together = threading.Barrier(2)
    run(3, body, SETTINGS.replace(timeout_s=1000.0))


@pytest.mark.parametrize("limit", ["timeout_s", "stall_shutdown_s"])
def test_limits_hold_when_rank_0_decides_nothing(monkeypatch: pytest.MonkeyPatch, clock: Clock, limit: str) -> None:
    monkeypatch.setattr(stalls_module, "_GRACE_S", 0.1)

    def body(negotiator: Negotiator) -> None:
        if negotiator.comm.rank == 0:
            # As if the interpreter were held up in foreign code.
            negotiator.comm.engine._thread._services._listeners._references.clear()
            is_held_up.set()
            assert given_up.wait(HANG_S)
            error = error_of(start(negotiator, "a", [1.0]))
            assert "rank 1 has given up" in str(error)
        else:
            assert is_held_up.wait(HANG_S)
            handle = start(negotiator, "a", [1.0])
            clock.go(1500.0)
            error = error_of(handle)
            assert isinstance(error, CommTimeoutError)
            assert "was not decided by rank 0 within 1000.1 s" in str(error)
            assert f"raise MPITRAIN_{limit.upper()}" in str(error)
            given_up.set()

    is_held_up, given_up = threading.Event(), threading.Event()
    run(2, body, SETTINGS.replace(**{limit: 1000.0}))


@pytest.mark.parametrize("missing", [0, 1])
def test_stall_warning_names_operation_and_ranks_again_and_again(
    caplog: pytest.LogCaptureFixture, missing: int
) -> None:
    def body(negotiator: Negotiator) -> None:
        if negotiator.comm.rank == missing:
            # Rank 0 warns though it has never started anything.
            assert warned_twice.wait(HANG_S)
        handle = start(negotiator, "late", [1.0])
        deadline_s = time.monotonic() + HANG_S
        while negotiator.comm.rank == 2 and len(expected_lines()) < 2 and time.monotonic() < deadline_s:
            time.sleep(0.01)
        if negotiator.comm.rank == 2:
            warned_twice.set()
        assert wait(handle) == [3.0]

    def expected_lines() -> list[str]:
        lines = [record.getMessage() for record in caplog.records]
        assert all(line.startswith("r0/3 | late: waits since ") for line in lines)
        return [line for line in lines if line.endswith(f" s for ranks [{missing}]; started by ranks {others}")]

    others = [rank for rank in range(3) if rank != missing]
    warned_twice = threading.Event()
    with caplog.at_level(logging.WARNING, "mpitrain"):
        run(3, body, SETTINGS.replace(stall_warning_s=0.1))
    assert len(expected_lines()) >= 2


@pytest.mark.parametrize("missing", [0, 2])
def test_stall_shutdown_ends_everything_on_the_group(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, missing: int
) -> None:
    monkeypatch.setattr(stalls_module, "_GRACE_S", 1e9)

    def body(negotiator: Negotiator) -> None:
        if negotiator.comm.rank == missing:
            lateness.take_part(negotiator)
            # It waits for something else of the group, which the others will never call.
            with pytest.raises(CommError, match=r"(left|given up).* was not started by ranks"):
                negotiator.group.barrier()
            error = error_of(start(negotiator, "a", [1.0]))
        else:
            handle = start(negotiator, "a", [1.0])
            lateness.take_part(negotiator)
            error = error_of(handle)
        assert isinstance(error, CommTimeoutError)
        assert f"a was not started by ranks [{missing}] within 1000 s" in str(error)
        assert "or raise MPITRAIN_STALL_SHUTDOWN_S" in str(error)

    lateness = Lateness(clock, "a", 2)
    run(3, body, SETTINGS.replace(stall_shutdown_s=1000.0))


def test_nothing_keeps_a_negotiator_that_is_gone() -> None:
    def body(transport: Transport) -> Any:
        comm = Communicator(transport, settings=SETTINGS)
        negotiator = Negotiator(comm)
        wait(start(negotiator, "a", [1.0]))
        negotiator.steps.note_absent(())
        # The other ranks may still be about to decide.
        comm.barrier()
        comm.engine.close()
        return weakref.ref(negotiator)

    # Without the garbage collector, which comes late in large programs, and communicators are few.
    gc.disable()
    try:
        assert [reference() for reference in run_ranks(2, body)] == [None, None]
    finally:
        gc.enable()


@pytest.mark.parametrize("failing", [0, 1])
def test_messages_that_cannot_be_taken_are_an_error_on_every_rank(failing: int) -> None:
    def body(negotiator: Negotiator) -> str:
        if negotiator.comm.rank == failing:

            def refuse() -> list[tuple[int, bytes]]:
                raise CommError("notices: the network is gone")

            negotiator._dialogue._transport.notices = refuse  # type: ignore[method-assign]
        return str(error_of(start(negotiator, "a", [1.0])))

    texts = run(2, body)
    assert all("the network is gone" in text for text in texts)
    assert texts[failing].startswith("a: cannot complete: this rank has failed with CommError")
    assert f"rank {failing} has failed with CommError" in texts[1 - failing]


def test_an_announcement_that_cannot_be_sent_leaves_nothing_behind() -> None:
    def body(negotiator: Negotiator) -> None:
        if negotiator.comm.rank == 1:
            control = negotiator._dialogue._transport
            notify = control.notify

            def refuse(dest: int, notice: bytes) -> None:
                control.notify = notify  # type: ignore[method-assign]
                raise CommError("notice: the network is gone")

            control.notify = refuse  # type: ignore[method-assign]
            with pytest.raises(CommError):
                start(negotiator, "a", [1.0])
        assert wait(start(negotiator, "a", [1.0])) == [2.0]

    run(2, body)


def test_a_rank_that_cannot_run_what_was_decided_does_not_leave_the_others_waiting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original = service_module.run_decision

    def starved(comm: Communicator, decision: Any, entries: Any) -> Any:
        if comm.rank == 1:
            raise MemoryError("no room for the fused buffer")
        return original(comm, decision, entries)

    monkeypatch.setattr(service_module, "run_decision", starved)
    texts = run(3, lambda negotiator: str(error_of(start(negotiator, "a", [1.0]))))
    assert all("no room for the fused buffer" in text for text in texts)


def test_operations_of_several_threads_of_each_rank() -> None:
    def body(negotiator: Negotiator) -> None:
        def work(thread: int) -> None:
            try:
                for index in range(20):
                    assert wait(start(negotiator, f"{thread} {index}", [thread + index])) == [2.0 * (thread + index)]
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=work, args=(thread,)) for thread in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(HANG_S)
            assert not thread.is_alive()

    failures: list[BaseException] = []
    run(2, body)
    assert failures == []


def test_leaving_while_operations_are_decided_never_hangs() -> None:
    def body(negotiator: Negotiator) -> None:
        rank = negotiator.comm.rank
        handles = [start(negotiator, f"n{index}", [1.0]) for index in range(5)]
        if rank == leaver:
            time.sleep(draw.random() * 2e-3)
            negotiator.leave("has shut down")
        for handle in handles:
            try:
                assert wait(handle) == [3.0]
            except CommTimeoutError:
                raise
            except CommError:
                pass

    draw = random.Random(0)
    for turn in range(30):
        leaver = turn % 3
        run(3, body)


def test_unnamed_operations_are_counted() -> None:
    names = run(2, lambda negotiator: [negotiator.next_name() for _ in range(3)])
    assert names[0] == names[1]
    assert len(set(names[0])) == 3


def test_arrays_that_are_not_contiguous_are_copied_and_left_alone() -> None:
    def body(negotiator: Negotiator) -> None:
        array = np.arange(12.0).reshape(3, 4).T
        result = wait(start(negotiator, "a", array))
        np.testing.assert_array_equal(result, 2 * np.arange(12.0).reshape(3, 4).T)
        np.testing.assert_array_equal(array, np.arange(12.0).reshape(3, 4).T)

    run(2, body)


def test_integer_average_is_divided_and_scaled_in_one_step() -> None:
    def body(negotiator: Negotiator) -> None:
        array = np.array([7, -7, 1]) if negotiator.comm.rank == 0 else np.array([0, 0, 0])
        plain = negotiator.start("a", "allreduce", [array], op="average")
        np.testing.assert_array_equal(wait(plain), [3, -3, 0])
        scaled = negotiator.start("b", "allreduce", [array], op="average", postscale=2.0)
        np.testing.assert_array_equal(wait(scaled), [7, -7, 1])
        rows = negotiator.start("c", "reduce_scatter", [array], op="average", postscale=2.0)
        np.testing.assert_array_equal(wait(rows), [[7, -7], [1]][negotiator.comm.rank])

    run(2, body)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_all_gather_of_several_arrays(size: int) -> None:
    def bring(rank: int) -> list[Any]:
        small = [np.full((rank + index, 2), 10.0 * rank + index, dtype) for index, dtype in enumerate(("f4", "i8"))]
        # The large one does not share the buffer of the small ones.
        return [small[0], np.full((40_000 * rank, 3), rank), small[1], np.array(7 * rank), np.zeros((0, 3))]

    def body(negotiator: Negotiator) -> None:
        rank = negotiator.comm.rank
        results = negotiator.start("a", "allgather", bring(rank)).wait(HANG_S)
        everybodys = [[np.atleast_1d(array) for array in bring(source)] for source in range(size)]
        for index, (result, rows) in enumerate(results):
            parts = [brought[index] for brought in everybodys]
            assert rows == [len(part) for part in parts]
            assert result.dtype == parts[0].dtype
            np.testing.assert_array_equal(result, np.concatenate(parts))
        assert negotiator.start("b", "allgather", []).wait(HANG_S) == []

    run(size, body)


@pytest.mark.parametrize("op", ["sum", "average", "max"])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_reduce_scatter_of_several_arrays(size: int, op: str) -> None:
    shapes = [((5, 2), "f4"), ((size,), "f8"), ((1,), "f4"), ((0, 3), "f4"), ((70_000 * 2 + 1,), "f4"), ((4, 3), "f4")]

    def body(negotiator: Negotiator) -> None:
        rank = negotiator.comm.rank
        arrays = [np.arange(np.prod(shape), dtype=dtype).reshape(shape) * (rank + 1) for shape, dtype in shapes]
        kept = [array.copy() for array in arrays]
        factor = {"sum": total(size), "average": (size + 1) / 2, "max": float(size)}[op]
        handle = negotiator.start("a", "reduce_scatter", arrays, op=op, prescale=0.5, postscale=4.0)
        for array, before, result in zip(arrays, kept, handle.wait(HANG_S), strict=True):
            expected = np.array_split(before / (rank + 1) * (2 * factor), size)[rank]
            assert result.dtype == array.dtype
            np.testing.assert_allclose(result, expected, rtol=1e-6)
            np.testing.assert_array_equal(array, before)

    run(size, body)


def test_a_group_with_a_meaningless_member_fails_as_a_whole() -> None:
    def body(negotiator: Negotiator) -> None:
        arrays = [np.ones(4), np.array([True, False])]
        for op, other, error in (("average", arrays[1], TypeError), ("sum", np.array(1.0), ValueError)):
            with pytest.raises(error, match=r"got bool|got shape"):
                negotiator.start("a", "reduce_scatter", [arrays[0], other], op=op).wait(HANG_S)
        assert wait(start(negotiator, "b", [1.0])) == [2.0]

    run(2, body)


@pytest.mark.parametrize("odd", [0, 1, 2])
def test_a_refusal_is_an_error_for_those_who_start_the_operation(odd: int) -> None:
    def body(negotiator: Negotiator) -> str:
        rank = negotiator.comm.rank
        if rank != odd:
            text = str(error_of(start(negotiator, "a", [rank + 1.0])))
            assert wait(start(negotiator, "a", [rank + 1.0])) == [6.0]
            return text
        for _ in range(2):
            negotiator.refuse("twice", "allreduce", "ValueError: not today")
        negotiator.refuse("a", "allreduce", "ValueError: not today")
        # A call that raised counts as one: this is the second, as on the other ranks.
        assert wait(start(negotiator, "a", [rank + 1.0])) == [6.0]
        return ""

    texts = run(3, body)
    assert texts.pop(odd) == ""
    for text in texts:
        assert text.startswith("a: One rank has unusable arguments")
        assert f"\n  rank {odd}: allreduce with unusable arguments: ValueError: not today\n" in f"{text}\n"


def test_what_all_refuse_leaves_nothing_behind() -> None:
    def body(negotiator: Negotiator) -> None:
        for turn in range(20):
            negotiator.refuse("a", "allreduce", "ValueError: not today")
            if turn % 3 == 0:
                negotiator.refuse("a", "allreduce", "ValueError: nor tomorrow")
            assert wait(start(negotiator, "a", [1.0])) == [3.0]
        assert wait(start(negotiator, "b", [1.0])) == [3.0]

    run(3, body)


def test_a_refusal_of_a_name_in_flight_says_nothing() -> None:
    def body(negotiator: Negotiator) -> None:
        if negotiator.comm.rank == 0:
            handle = start(negotiator, "a", [1.0])
            negotiator.refuse("a", "allreduce", "ValueError: not today")
            refused.set()
        else:
            assert refused.wait(HANG_S)
            handle = start(negotiator, "a", [1.0])
        assert wait(handle) == [2.0]

    refused = threading.Event()
    run(2, body)


def test_what_waits_behind_a_refusal_ends_with_the_group() -> None:
    def body(negotiator: Negotiator) -> None:
        if negotiator.comm.rank == 1:
            negotiator.refuse("a", "allreduce", "ValueError: not today")
            handle = start(negotiator, "a", [1.0])
            waits.set()
            assert "rank 0 has gone fishing" in str(error_of(handle))
        else:
            assert waits.wait(HANG_S)
            negotiator.leave("has gone fishing")

    waits = threading.Event()
    run(2, body)


@pytest.mark.parametrize("odd", [0, 1])
def test_a_refusal_of_one_rank_does_not_end_the_group(odd: int, clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    """The others never start it, and go on with something else for longer than a stalled operation may last."""

    def body(negotiator: Negotiator) -> None:
        if negotiator.comm.rank == odd:
            negotiator.refuse("a", "allreduce", "ValueError: not today")
        for index in range(40):
            assert wait(start(negotiator, f"b{index}", [1.0])) == [2.0]
            if negotiator.comm.rank == 0:
                # One operation at most is under way meanwhile.
                clock.now_s += 20.0
                negotiator.attend()
        # It is still an error for whoever starts it.
        if negotiator.comm.rank != odd:
            assert "not today" in str(error_of(start(negotiator, "a", [1.0])))
        assert wait(start(negotiator, "a", [1.0])) == [2.0]

    with caplog.at_level(logging.WARNING, "mpitrain"):
        run(2, body, SETTINGS.replace(stall_warning_s=100.0, stall_shutdown_s=300.0))
    lines = [record.getMessage() for record in caplog.records]
    refusal = f"refused by rank {odd}: ValueError: not today"
    assert lines == [f"r0/2 | a: not started, as it was {refusal}; ranks [{1 - odd}] have not called it"]


@pytest.mark.parametrize("odd", [0, 1])
def test_what_waits_behind_a_refusal_that_nobody_else_meets_is_overdue_some_time(
    odd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stalls_module, "_GRACE_S", 0.1)

    def body(negotiator: Negotiator) -> None:
        if negotiator.comm.rank == odd:
            negotiator.refuse("a", "allreduce", "ValueError: not today")
            error = error_of(start(negotiator, "a", [1.0]))
            ended.set()
            assert isinstance(error, CommTimeoutError)
            assert "a waits behind a call that was refused here" in str(error)
        else:
            while not ended.is_set():
                negotiator.attend()
                time.sleep(0.01)

    ended = threading.Event()
    run(2, body, SETTINGS.replace(stall_shutdown_s=0.3))
