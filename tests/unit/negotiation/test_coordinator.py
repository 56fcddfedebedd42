"""Decisions of rank 0 from announcements and times, without any messages."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpitrain.memory import DTYPES
from mpitrain.negotiation.announcement import Announcement, Decision, Tensor
from mpitrain.negotiation.coordinator import Coordinator

ITEMSIZES = {name: dtype.itemsize for name, dtype in DTYPES.items()}


def make(size: int = 2, fusion_nbytes: int = 1 << 20) -> Coordinator:
    return Coordinator(size, fusion_nbytes, ITEMSIZES)


def allreduce(
    name: str, *shapes: tuple[int, ...], dtype: str = "float32", op: str = "sum", **rest: float
) -> Announcement:
    tensors = tuple(Tensor(dtype, shape) for shape in shapes or ((3,),))
    return Announcement(name, "allreduce", tensors, op, **rest)  # type: ignore[arg-type]


def join(coordinator: Coordinator, rank: int) -> None:
    coordinator.announce(rank, Announcement("join", "join"), 0.0)


def announce_all(coordinator: Coordinator, size: int, *announcements: Announcement) -> None:
    for announcement in announcements:
        for rank in range(size):
            coordinator.announce(rank, announcement, 0.0)


def test_nothing_runs_before_all_ranks_announced() -> None:
    coordinator = make(3)
    for rank in (2, 0):
        coordinator.announce(rank, allreduce("a"), 0.0)
        assert coordinator.decide() == []
    coordinator.announce(1, allreduce("a"), 0.0)
    assert coordinator.decide() == [Decision(("a",))]
    assert coordinator.decide() == []


def test_a_name_may_come_again_after_its_decision() -> None:
    coordinator = make()
    for _ in range(3):
        announce_all(coordinator, 2, allreduce("a"))
        assert coordinator.decide() == [Decision(("a",))]


@given(st.permutations(range(5)), st.permutations(range(5)))
def test_every_order_of_announcements_decides_each_name_once(first: list[int], second: list[int]) -> None:
    coordinator = make(fusion_nbytes=1)
    decided: list[str] = []
    for mine, yours in zip(first, second, strict=True):
        coordinator.announce(0, allreduce(f"n{mine}"), 0.0)
        coordinator.announce(1, allreduce(f"n{yours}"), 0.0)
        decided += [name for decision in coordinator.decide() for name in decision.names]
    assert sorted(decided) == [f"n{index}" for index in range(5)]


def test_decisions_come_in_the_order_in_which_operations_became_ready() -> None:
    coordinator = make(fusion_nbytes=1)
    for rank, names in enumerate((("a", "b", "c"), ("c", "a", "b"))):
        for name in names:
            coordinator.announce(rank, allreduce(name), 0.0)
    assert [decision.names for decision in coordinator.decide()] == [("c",), ("a",), ("b",)]


def test_allreduces_that_are_ready_together_are_fused_up_to_the_limit() -> None:
    coordinator = make(fusion_nbytes=100)
    # 12 bytes each: eight fit into 100 bytes.
    announce_all(coordinator, 2, *(allreduce(f"n{index}") for index in range(20)))
    decisions = coordinator.decide()
    assert [len(decision.names) for decision in decisions] == [8, 8, 4]
    assert [name for decision in decisions for name in decision.names] == [f"n{index}" for index in range(20)]


def test_an_allreduce_above_the_limit_runs_alone() -> None:
    coordinator = make(fusion_nbytes=100)
    announce_all(coordinator, 2, allreduce("a"), allreduce("big", (1000,)), allreduce("b"))
    names = [decision.names for decision in coordinator.decide()]
    assert ("big",) in names
    assert sorted(itertools.chain(*names)) == ["a", "b", "big"]


@pytest.mark.parametrize(
    "other",
    [
        allreduce("b", dtype="float64"),
        allreduce("b", op="max"),
        allreduce("b", prescale=0.5),
        allreduce("b", postscale=0.5),
        Announcement("b", "broadcast", (Tensor("float32", (3,)),), root=0),
    ],
    ids=["dtype", "op", "prescale", "postscale", "collective"],
)
def test_what_differs_is_not_fused(other: Announcement) -> None:
    coordinator = make()
    announce_all(coordinator, 2, allreduce("a"), other)
    assert sorted(decision.names for decision in coordinator.decide()) == [("a",), ("b",)]


def test_a_group_is_fused_as_a_whole_and_one_of_several_dtypes_not_at_all() -> None:
    coordinator = make()
    mixed = Announcement("m", "allreduce", (Tensor("float32", (2,)), Tensor("int64", (2,))), "sum")
    announce_all(coordinator, 2, allreduce("a"), allreduce("g", (2,), (3,)), mixed, mixed._replace(name="n"))
    assert sorted(decision.names for decision in coordinator.decide()) == [("a", "g"), ("m",), ("n",)]


def test_allgather_decision_has_the_rows_of_all_ranks_for_each_tensor() -> None:
    coordinator = make(3)
    for rank in (1, 2, 0):
        tensors = (Tensor("int8", (rank, 2)), Tensor("float32", (10 + rank,)))
        coordinator.announce(rank, Announcement("a", "allgather", tensors), 0.0)
    assert coordinator.decide() == [Decision(("a",), rows=((0, 1, 2), (10, 11, 12)))]


def test_alltoall_decision_has_the_splits_of_all_ranks() -> None:
    coordinator = make(2)
    for rank in (1, 0):
        announcement = Announcement("a", "alltoall", (Tensor("int8", (5,)),), splits=(rank, 5 - rank))
        coordinator.announce(rank, announcement, 0.0)
    assert coordinator.decide() == [Decision(("a",), splits=((0, 5), (1, 4)))]


def test_mismatch_is_an_error_and_the_others_run() -> None:
    coordinator = make()
    announce_all(coordinator, 2, allreduce("good"))
    coordinator.announce(0, allreduce("bad", (2,)), 0.0)
    coordinator.announce(1, allreduce("bad", (3,)), 0.0)
    error, good = coordinator.decide()
    assert (error.names, error.reason) == (("bad",), "mismatch")
    assert "rank 0: allreduce sum of float32 [2]" in error.error
    assert "rank 1: allreduce sum of float32 [3]" in error.error
    assert good == Decision(("good",))


def test_a_rank_that_left_closes_everything() -> None:
    coordinator = make(3)
    announce_all(coordinator, 3, allreduce("complete"))
    coordinator.announce(0, allreduce("a"), 0.0)
    coordinator.leave(2, "has finished")
    # Who left has announced "complete", but takes no part in it any more.
    assert coordinator.decide() == [Decision((), reason="left", closed="rank 2 has finished")]
    assert coordinator.decide() == []


def test_overdue_names_operation_and_ranks() -> None:
    coordinator = make(4)
    coordinator.announce(1, allreduce("a"), 10.0)
    coordinator.announce(3, allreduce("a"), 14.0)
    coordinator.announce(1, allreduce("young"), 14.5)
    assert coordinator.overdue(5.0, 15.0) == []
    assert coordinator.overdue(5.0, 15.1) == ["a was not started by ranks [0, 2] within 5 s"]


def test_stalled_names_who_is_missing_and_who_is_not_again_and_again() -> None:
    coordinator = make(4)
    join(coordinator, 3)
    coordinator.announce(1, allreduce("a"), 10.0)
    assert coordinator.stalled(5.0, 15.0) == []
    line = "a: waits since {} s for ranks [0, 2]; started by ranks [1], ranks [3] have joined"
    assert coordinator.stalled(5.0, 16.0) == [line.format(6)]
    assert coordinator.stalled(5.0, 21.0) == []
    coordinator.announce(2, allreduce("b"), 21.0)
    assert coordinator.stalled(5.0, 21.1) == [line.format(11)]
    # Still a valid operation.
    for rank in (0, 2):
        coordinator.announce(rank, allreduce("a"), 22.0)
    assert [decision.names for decision in coordinator.decide()] == [(), ("a",)]


def test_operations_are_complete_without_ranks_that_have_joined() -> None:
    coordinator = make(3)
    coordinator.announce(0, allreduce("before"), 0.0)
    coordinator.announce(1, allreduce("before"), 0.0)
    assert coordinator.decide() == []
    join(coordinator, 2)
    told = Decision((), absent=(2,))
    assert coordinator.decide() == [told, Decision(("before",), absent=(2,), announced=(allreduce("before"),))]
    coordinator.announce(1, allreduce("after", (4,)), 0.0)
    assert coordinator.decide() == []
    coordinator.announce(0, allreduce("after", (4,)), 0.0)
    assert coordinator.decide() == [Decision(("after",), absent=(2,), announced=(allreduce("after", (4,)),))]


def test_what_a_rank_started_before_it_joined_it_brings() -> None:
    coordinator = make(3)
    coordinator.announce(2, allreduce("a"), 0.0)
    join(coordinator, 2)
    join(coordinator, 1)
    coordinator.announce(0, allreduce("a"), 0.0)
    coordinator.announce(0, allreduce("b"), 0.0)
    told, first, second = coordinator.decide()
    assert told == Decision((), absent=(1, 2))
    assert (first.names, first.absent) == (("a",), (1,))
    # Not fused with the first, as other ranks are absent.
    assert (second.names, second.absent) == (("b",), (1, 2))


def test_the_last_to_join_is_the_same_for_all_and_then_nobody_has_joined() -> None:
    coordinator = make(3)
    for last in (0, 2, 1):
        order = [rank for rank in range(3) if rank != last] + [last]
        for rank in order[:2]:
            join(coordinator, rank)
            assert [decision.names for decision in coordinator.decide()] == [()]
        coordinator.announce(last, allreduce("a"), 0.0)
        join(coordinator, last)
        reduced, ended = coordinator.decide()
        assert (reduced.names, reduced.absent) == (("a",), tuple(sorted(order[:2])))
        assert ended == Decision(("join",), last=last)
        # From here on all are needed again.
        coordinator.announce(0, allreduce("a"), 0.0)
        assert coordinator.decide() == []
        coordinator.announce(1, allreduce("a"), 0.0)
        coordinator.announce(2, allreduce("a"), 0.0)
        assert coordinator.decide() == [Decision(("a",))]


def test_rows_and_splits_of_absent_ranks_are_none() -> None:
    coordinator = make(3)
    join(coordinator, 1)
    sent = Announcement("s", "alltoall", (Tensor("int8", (5,)),), splits=(2, 0, 3))
    for rank in (0, 2):
        gathered = Announcement("g", "allgather", (Tensor("int8", (rank + 1, 2)), Tensor("float32", (rank,))))
        coordinator.announce(rank, gathered, 0.0)
        coordinator.announce(rank, sent, 0.0)
    _, rows, splits = coordinator.decide()
    assert (rows.rows, rows.absent) == (((1, 0, 3), (0, 0, 2)), (1,))
    assert (splits.splits, splits.absent) == (((2, 0, 3), (0, 0, 0), (2, 0, 3)), (1,))


@pytest.mark.parametrize(
    ("announcement", "message"),
    [
        (
            Announcement("x", "broadcast", (Tensor("int8", (3,)),), root=1),
            "x: rank 1 has joined, and brings nothing to broadcast; broadcast from a rank that still has data",
        ),
        (
            Announcement("x", "alltoall", (Tensor("int8", (3,)),), splits=(1, 2, 0)),
            "x: rank 0 sends rows to ranks [1], which have joined and take none; pass splits that are 0 for them",
        ),
    ],
    ids=["broadcast", "alltoall"],
)
def test_what_cannot_be_without_a_rank_is_an_error_and_the_others_run(announcement: Announcement, message: str) -> None:
    coordinator = make(3)
    join(coordinator, 1)
    for rank in (0, 2):
        coordinator.announce(rank, announcement, 0.0)
        coordinator.announce(rank, announcement._replace(name="y", collective="broadcast", root=2, splits=()), 0.0)
    _, error, good = coordinator.decide()
    assert (error.names, error.reason, error.announced) == (("x",), "absent", ())
    assert error.error.startswith(message)
    assert (good.names, good.absent) == (("y",), (1,))


@given(st.integers(2, 5), st.randoms(use_true_random=False))
def test_ranks_that_join_at_any_time_and_start_in_any_order_complete_everything(size: int, draw: random.Random) -> None:
    """Rank r has the first of its own number of operations, in an order of its own, and joins then."""
    coordinator = make(size, fusion_nbytes=1)
    names = [f"n{index}" for index in range(6)]
    decided: list[tuple[str, tuple[int, ...]]] = []
    for epoch in range(2):
        to_do: dict[int, list[str]] = {}
        for rank in range(size):
            to_do[rank] = names[: draw.randint(0, 6)]
            draw.shuffle(to_do[rank])
        most = max(map(len, to_do.values()))
        has = {rank: set(mine) for rank, mine in to_do.items()}
        ended = []
        while to_do and not ended:
            rank = draw.choice(list(to_do))
            if to_do[rank]:
                coordinator.announce(rank, allreduce(to_do[rank].pop()), 0.0)
            else:
                join(coordinator, rank)
                del to_do[rank]
                last = rank
            for decision in coordinator.decide() if draw.random() < 0.5 or not to_do else []:
                if decision.last >= 0:
                    ended.append(decision.last)
                decided += [(name, decision.absent) for name in decision.names if name != "join"]
        assert ended == [last]
        assert sorted(name for name, _ in decided) == names[:most]
        for name, absent in decided:
            assert set(absent) == {rank for rank in range(size) if name not in has[rank]}, epoch
        decided = []


def test_a_step_that_has_ended_is_not_waited_for() -> None:
    step, end = Announcement("step.0.1", "step"), Announcement("step.0.1", "end of step")
    coordinator = make(3)
    coordinator.announce(2, Announcement("join", "join"), 0.0)
    coordinator.announce(1, step, 0.0)
    assert [decision.absent for decision in coordinator.decide()] == [(2,)]
    coordinator.announce(1, end, 0.1)
    assert coordinator.overdue(1.0, 5.0) == coordinator.stalled(1.0, 5.0) == []
    # What all had announced before is decided, and whoever has joined knows that it has made that step.
    coordinator.announce(0, step, 6.0)
    coordinator.announce(1, step, 6.0)
    coordinator.announce(1, end, 6.0)
    assert [decision.names for decision in coordinator.decide()] == [("step.0.1",)]


def test_a_refusal_that_nobody_waits_for_is_not_overdue_and_reported_once() -> None:
    coordinator = make(3)
    coordinator.announce(1, Announcement("a", "allreduce", problem="ValueError: not today"), 0.0)
    assert coordinator.decide() == []
    assert coordinator.overdue(5.0, 100.0) == []
    assert coordinator.stalled(5.0, 100.0) == [
        "a: not started, as it was refused by rank 1: ValueError: not today; ranks [0, 2] have not called it"
    ]
    assert coordinator.stalled(5.0, 200.0) == []
    # Whoever starts it waits from then on.
    coordinator.announce(0, allreduce("a"), 300.0)
    assert coordinator.overdue(5.0, 304.0) == coordinator.stalled(5.0, 304.0) == []
    assert coordinator.overdue(5.0, 306.0) == [
        "a was not started by ranks [2] within 5 s, and was refused by rank 1: ValueError: not today"
    ]
    assert coordinator.stalled(5.0, 306.0) == [
        "a: waits since 6 s for ranks [2]; started by ranks [0], refused by rank 1: ValueError: not today"
    ]
    coordinator.announce(2, allreduce("a"), 307.0)
    (decision,) = coordinator.decide()
    assert "One rank has unusable arguments" in decision.error
    assert coordinator.overdue(5.0, 1000.0) == []
