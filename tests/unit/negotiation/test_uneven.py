"""Ranks that join at different times, among threads: every collective, in any order, epoch after epoch."""

from __future__ import annotations

import random
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpitrain.collectives import Communicator
from mpitrain.comm import Transport, run_ranks
from mpitrain.config import Settings
from mpitrain.errors import CollectiveError, RankFailedError
from mpitrain.negotiation import Negotiator
from mpitrain.negotiation import dialogue as dialogue_module
from mpitrain.negotiation import negotiator as negotiator_module
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


def join(negotiator: Negotiator) -> int:
    """Join, and stand in for steps as they come."""
    due: deque[Callable[[], None]] = deque()
    handle = negotiator.join(due.append)
    while not handle.done:
        negotiator.comm.engine.wait_until(lambda: due or handle.done, "join", HANG_S)
        while due:
            due.popleft()()
    (last,) = handle.wait()
    return int(last)


def reduce(negotiator: Negotiator, array: Any, op: str = "sum", **options: Any) -> Any:
    handle = negotiator.start(negotiator.next_name(), "allreduce", [np.asarray(array)], op=op, **options)
    (result,) = handle.wait(HANG_S)
    return result


@settings(max_examples=15)
@given(seed=st.integers(0, 2**32), size=st.integers(1, 5), fusion_nbytes=st.sampled_from([1, 1 << 20]))
def test_sums_are_those_of_the_ranks_that_have_not_joined(seed: int, size: int, fusion_nbytes: int) -> None:
    """Rank r has the first of its own number of operations, in an order of its own, in several epochs."""
    common = random.Random(seed)
    lengths = [[common.randint(0, 6) for _ in range(size)] for _ in range(3)]

    def body(negotiator: Negotiator) -> list[int]:
        rank = negotiator.comm.rank
        draw = random.Random(f"{seed} {rank}")
        lasts = []
        for epoch in lengths:
            indices = list(range(epoch[rank]))
            draw.shuffle(indices)
            handles = {}
            for index in indices:
                array = np.full(index + 1, 10.0**rank)
                handles[index] = negotiator.start(f"n{index}", "allreduce", [array], op="sum", in_place=index % 2 == 0)
                if draw.random() < 0.3:
                    time.sleep(draw.random() * 1e-3)
            for index, handle in handles.items():
                (result,) = handle.wait(HANG_S)
                total = sum(10.0**other for other in range(size) if epoch[other] > index)
                np.testing.assert_array_equal(result, np.full(index + 1, total))
            lasts.append(join(negotiator))
        return lasts

    results = run(size, body, SETTINGS.replace(fusion_nbytes=fusion_nbytes))
    assert all(lasts == results[0] for lasts in results)


@pytest.mark.parametrize("joined", [0, 1, 2])
def test_every_reduction_leaves_the_result_to_the_others(joined: int) -> None:
    def body(negotiator: Negotiator) -> int:
        rank = negotiator.comm.rank
        if rank != joined:
            first, second = (other for other in range(3) if other != joined)
            # Not yet joined somewhere else, the other two are alone from here on.
            assert reduce(negotiator, [rank + 1.0]).tolist() == [first + second + 2.0]
            assert reduce(negotiator, [rank + 1.0], "average").tolist() == [(first + second + 2.0) / 3]
            assert reduce(negotiator, [rank + 1], "min").tolist() == [first + 1]
            assert reduce(negotiator, [-1.0 - rank], "max").tolist() == [-1.0 - first]
            assert reduce(negotiator, [rank + 2], "product", prescale=2.0).tolist() == [4 * (first + 2) * (second + 2)]
            assert reduce(negotiator, [True, rank == first], "product").tolist() == [True, False]
            unit = np.eye(3)[rank]
            assert reduce(negotiator, unit, "adasum").tolist() == [float(other != joined) for other in range(3)]
            handle = negotiator.start("rs", "reduce_scatter", [np.arange(7) * (rank + 1)], op="sum", postscale=2.0)
            bounds = [0, 3, 5, 7]
            part = np.arange(7)[bounds[rank] : bounds[rank + 1]] * (first + second + 2) * 2
            np.testing.assert_array_equal(handle.wait(HANG_S)[0], part)
        return join(negotiator)

    assert len(set(run(3, body))) == 1


@pytest.mark.parametrize("joined", [0, 1, 2])
def test_what_is_not_reduced_comes_from_the_others(joined: int) -> None:
    def body(negotiator: Negotiator) -> int:
        rank = negotiator.comm.rank
        if rank != joined:
            others = [other for other in range(3) if other != joined]
            arrays = [np.full((rank + 1, 2), rank, np.int8), np.full(rank, 1.5 * rank)]
            # A result may come with the rows of each rank.
            first, second = negotiator.start("g", "allgather", arrays).wait(HANG_S)
            first, second = (each[0] if isinstance(each, tuple) else each for each in (first, second))
            np.testing.assert_array_equal(first, np.concatenate([np.full((r + 1, 2), r) for r in others]))
            np.testing.assert_array_equal(second, np.concatenate([np.full(r, 1.5 * r) for r in others]))
            root = others[1]
            (sent,) = negotiator.start("b", "broadcast", [np.arange(5) + rank], root=root, in_place=True).wait(HANG_S)
            np.testing.assert_array_equal(sent, np.arange(5) + root)
            splits = [0 if other == joined else 2 + rank for other in range(3)]
            ((rows, received),) = negotiator.start("s", "alltoall", [np.full(sum(splits), rank)], splits=splits).wait(
                HANG_S
            )
            assert list(received) == [0 if other == joined else 2 + other for other in range(3)]
            assert rows.tolist() == [other for other in others for _ in range(2 + other)]
            negotiator.start("barrier", "barrier").wait(HANG_S)
        return join(negotiator)

    assert len(set(run(3, body))) == 1


def test_what_needs_a_rank_that_has_joined_is_an_error_on_all_others() -> None:
    def body(negotiator: Negotiator) -> None:
        if negotiator.comm.rank != 1:
            errors = []
            for name, collective, options in [
                ("b", "broadcast", {"root": 1}),
                ("s", "alltoall", {"splits": [1, 1, 1]}),
            ]:
                with pytest.raises(CollectiveError) as caught:
                    negotiator.start(name, collective, [np.zeros(3)], **options).wait(HANG_S)
                errors.append(str(caught.value))
            assert errors[0].startswith("b: rank 1 has joined, and brings nothing to broadcast")
            assert errors[1].startswith("s: rank 0 sends rows to ranks [1], which have joined")
            # All goes on.
            assert reduce(negotiator, [1.0]).tolist() == [2.0]
        join(negotiator)
        assert reduce(negotiator, [1.0]).tolist() == [3.0]

    run(3, body)


def test_unnamed_operations_meet_again_after_all_have_joined() -> None:
    def body(negotiator: Negotiator) -> None:
        rank, size = negotiator.comm.rank, negotiator.comm.size
        for epoch in range(4):
            for index in range((rank + epoch) % size * 2):
                total = sum(other + 1 for other in range(size) if (other + epoch) % size * 2 > index)
                assert reduce(negotiator, [rank + 1.0]).tolist() == [total]
            join(negotiator)

    run(3, body)


def test_a_rank_that_has_joined_starts_nothing() -> None:
    def body(negotiator: Negotiator) -> None:
        handle = negotiator.join(lambda _: None)
        if negotiator.comm.rank == 1:
            with pytest.raises(ValueError, match="a: cannot be started on a rank that has joined; wait until join"):
                negotiator.start("a", "allreduce", [np.zeros(3)], op="sum")
            refused.append(True)
        handle.wait(HANG_S)

    refused: list[bool] = []
    run(2, lambda negotiator: body(negotiator) if negotiator.comm.rank else (wait_for(refused), body(negotiator)))


def wait_for(refused: list[bool]) -> None:
    deadline_s = time.monotonic() + HANG_S
    while not refused and time.monotonic() < deadline_s:
        time.sleep(0.001)


def test_a_rank_that_leaves_ends_the_waiting_of_those_that_have_joined() -> None:
    def body(negotiator: Negotiator) -> None:
        if negotiator.comm.rank == 1:
            time.sleep(0.02)
            negotiator.leave("has gone fishing")
        else:
            with pytest.raises(RankFailedError, match="rank 1 has gone fishing"):
                join(negotiator)

    run(3, body)


class Maker:
    """Makes steps that are all-reduces on a communicator of their own, in order and without negotiation."""

    def __init__(self, negotiator: Negotiator) -> None:
        self.comm = negotiator.group.duplicate()
        self.comm.while_waiting(negotiator.attend)
        self.steps = negotiator.steps
        self.number = self.steps.register(self.stand_in)
        self.stood_in = 0

    def step(self, value: float, inside: Callable[[], None] | None = None) -> float:
        with self.steps.entered(self.number):
            result = float(self.comm.allreduce_async(np.array([value])).wait(HANG_S)[0])
            if inside is not None:
                inside()
            return result

    def stand_in(self) -> None:
        self.stood_in += 1
        self.comm.allreduce_async(np.array([0.0])).wait(HANG_S)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_steps_that_nobody_negotiates_go_on_without_ranks_that_have_joined(size: int) -> None:
    def body(negotiator: Negotiator) -> None:
        rank = negotiator.comm.rank
        makers = [Maker(negotiator), Maker(negotiator)]
        for epoch in range(3):
            lengths = [(other * 2 + epoch) % (2 * size) for other in range(size)]
            for maker in makers:
                maker.stood_in = 0
            for index in range(lengths[rank]):
                active = [other for other in range(size) if lengths[other] > index]
                maker = makers[index % 2]
                assert maker.step(rank + 1.0) == sum(other + 1.0 for other in active)
                # Among named operations, which are negotiated.
                assert reduce(negotiator, [1.0]).tolist() == [float(len(active))]
            join(negotiator)
            assert sum(maker.stood_in for maker in makers) == max(lengths) - lengths[rank]

    run(size, body)


def attend_until(negotiator: Negotiator, is_over: Callable[[], object]) -> None:
    """Look for what other ranks have said, as who waits for something else does."""
    deadline_s = time.monotonic() + HANG_S
    while not is_over() and time.monotonic() < deadline_s:
        negotiator.attend()
        negotiator.comm.engine.advance_all()
        time.sleep(0.001)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_a_rank_does_not_stand_in_for_a_step_that_it_has_made(size: int) -> None:
    """The others learn that it has joined while they are not through with a step to which it has brought data."""

    def body(negotiator: Negotiator) -> None:
        rank = negotiator.comm.rank
        maker = Maker(negotiator)
        is_leaver = rank == size - 1

        def learn() -> None:
            attend_until(negotiator, lambda: negotiator.steps.absent)
            assert negotiator.steps.absent == (size - 1,)

        total = sum(range(1, size + 1))
        for epoch in range(1, 3):
            assert maker.step(rank + 1.0, None if is_leaver else learn) == total
            if not is_leaver:
                assert maker.step(rank + 1.0) == total - size
                assert reduce(negotiator, [1.0]).tolist() == [size - 1.0]
                assert maker.step(rank + 1.0) == total - size
            join(negotiator)
            assert maker.stood_in == 2 * epoch * is_leaver

    run(size, body)


@pytest.mark.parametrize("size", [3, 4])
@pytest.mark.parametrize("early", [0, 1])
def test_a_step_that_is_announced_late_is_not_waited_for_when_it_has_ended(
    size: int, early: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One rank is through with a step before it learns of a rank that has joined, the others announce it."""
    ended: list[int] = []
    clock = Clock()
    for module in (negotiator_module, dialogue_module):
        monkeypatch.setattr(module, "time", clock)
    busy = threading.Barrier(size - 1)

    def attend_often(negotiator: Negotiator) -> None:
        for _ in range(20):
            negotiator.attend()
            negotiator.comm.engine.advance_all()

    def body(negotiator: Negotiator) -> None:
        rank = negotiator.comm.rank
        maker = Maker(negotiator)

        def learn() -> None:
            attend_until(negotiator, lambda: negotiator.steps.absent)
            assert negotiator.steps.absent == (size - 1,)

        is_late = rank not in (early, size - 1)
        assert maker.step(rank + 1.0, learn if is_late else None) == sum(range(1, size + 1))
        ended.append(rank)
        if rank < size - 1:
            # All are busy with something else for longer than a stalled operation may last.
            attend_until(negotiator, lambda: len(ended) == size)
            attend_often(negotiator)
            if busy.wait(HANG_S) == 0:
                clock.now_s += 600.0
            busy.wait(HANG_S)
            attend_often(negotiator)
            busy.wait(HANG_S)
            assert maker.step(rank + 1.0) == sum(range(1, size))
            assert not negotiator._in_flight.awaits_decision
        join(negotiator)

    run(size, body, SETTINGS.replace(stall_warning_s=100.0, stall_shutdown_s=300.0))
