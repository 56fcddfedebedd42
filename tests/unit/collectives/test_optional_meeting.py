"""Meetings that a rank may decline: all take the same way, in whatever order they look, and none waits in vain."""

from __future__ import annotations

import random

import numpy as np
import pytest

from mpitrain.collectives.meeting import meeting_nbytes
from mpitrain.collectives.optional_meeting import OptionalMeeting
from mpitrain.memory import SharedBlock

SLOT_NBYTES = 16


def make(size: int) -> list[OptionalMeeting]:
    views = [np.zeros(meeting_nbytes(SLOT_NBYTES), np.uint8) for _ in range(size)]
    return [OptionalMeeting(SharedBlock(views, None), rank, 0, SLOT_NBYTES) for rank in range(size)]


def test_a_meeting_takes_place_when_all_have_come() -> None:
    first, second, third = make(3)
    first.come(7, "visitor")
    second.come(7, "visitor")
    assert first.visitor == "visitor"
    assert not first.is_complete()
    assert first.missing() == [2]
    assert first.find_absent() is None
    third.come(7, "visitor")
    assert all(meeting.is_complete() and meeting.agrees() for meeting in (first, second, third))
    third.leave(took_place=True)
    # Whoever looks late sees it all the same, though another has come to the next one.
    third.come(8, "visitor")
    assert first.is_complete()
    assert first.agrees()
    assert not third.is_complete()
    assert third.find_absent() is None


def test_who_waits_sees_that_another_has_declined_and_both_meet_in_the_next_era() -> None:
    first, second = make(2)
    first.come(7, "visitor")
    second.decline()
    assert second.is_declined
    assert first.find_absent() == 1
    first.leave(took_place=False)
    first.decline()
    for meeting in (first, second):
        meeting.begin_era()
        assert not meeting.is_declined
        meeting.come(9, "visitor")
    assert first.is_complete()
    assert second.is_complete()


def test_an_era_begins_for_who_waits_when_it_leaves() -> None:
    first, second = make(2)
    first.come(7, "visitor")
    second.decline()
    first.begin_era()
    second.begin_era()
    second.come(8, "visitor")
    assert first.find_absent() == 1
    assert not second.is_complete()
    first.leave(took_place=False)
    first.come(8, "visitor")
    assert first.is_complete()
    assert second.is_complete()


def test_to_decline_while_waiting_changes_nothing_about_that_meeting() -> None:
    first, second = make(2)
    first.come(7, "visitor")
    first.decline()
    second.come(7, "visitor")
    assert second.find_absent() is None
    assert second.is_complete()
    assert first.is_complete()
    first.leave(took_place=True)
    second.leave(took_place=True)
    assert not first.is_declined


class Rank:
    """A rank with several operations, of which each is brought to a meeting or takes the other way.

    The other way is what a coordinator decides when all ranks have announced an operation: it begins an era. Decisions
    reach each rank in one order, and whenever chance has it.
    """

    def __init__(self, world: World, rank: int, plan: list[bool]) -> None:
        self.world = world
        self.rank = rank
        self.meeting = world.meetings[rank]
        self.plan = plan
        self.ways: list[str] = []
        self.undecided: set[int] = set()
        self.num_decisions = 0
        self.waits_for: int | None = None

    @property
    def is_done(self) -> bool:
        return len(self.ways) == len(self.plan) and not self.undecided

    def move(self) -> None:
        """Do one thing that can be done next."""
        if self.num_decisions < len(self.world.decisions) and self.world.chance.random() < 0.4:
            self.take_decision()
        elif self.waits_for is not None:
            self.look()
        elif len(self.ways) < len(self.plan) and (not self.undecided or self.world.chance.random() < 0.3):
            self.start()

    def start(self) -> None:
        number = len(self.ways)
        if self.plan[number] and not self.undecided and not self.meeting.is_declined:
            self.meeting.come(number, "visitor")
            self.waits_for = number
        else:
            self.announce(number)

    def announce(self, number: int) -> None:
        self.ways.append("announced")
        self.undecided.add(number)
        self.world.announce(number, self.rank)
        self.meeting.decline()

    def look(self) -> None:
        assert self.waits_for is not None
        number, self.waits_for = self.waits_for, None
        if self.meeting.is_complete():
            assert self.meeting.agrees()
            self.ways.append("met")
            self.leave(took_place=True)
        elif self.meeting.find_absent() is not None:
            self.leave(took_place=False)
            self.announce(number)
        else:
            self.waits_for = number

    def leave(self, *, took_place: bool) -> None:
        self.meeting.leave(took_place=took_place)
        self.decline_if_busy()

    def take_decision(self) -> None:
        self.undecided.discard(self.world.decisions[self.num_decisions])
        self.num_decisions += 1
        self.meeting.begin_era()
        self.decline_if_busy()

    def decline_if_busy(self) -> None:
        if self.undecided:
            self.meeting.decline()


class World:
    """Ranks whose steps chance interleaves."""

    def __init__(self, seed: int, size: int, length: int, share: float) -> None:
        self.chance = random.Random(seed)
        self.meetings = make(size)
        self.announced: dict[int, set[int]] = {}
        self.decisions: list[int] = []
        self.ranks = [Rank(self, rank, [self.chance.random() < share for _ in range(length)]) for rank in range(size)]

    def announce(self, number: int, rank: int) -> None:
        self.announced.setdefault(number, set()).add(rank)
        if len(self.announced[number]) == len(self.ranks):
            self.decisions.append(number)

    def run(self) -> None:
        for _ in range(20_000):
            left = [rank for rank in self.ranks if not rank.is_done]
            if not left:
                return
            self.chance.choice(left).move()
        raise AssertionError("ranks wait in vain")


@pytest.mark.parametrize("size", [2, 3, 5])
@pytest.mark.parametrize("share", [0.5, 0.9, 1.0])
def test_all_ranks_take_the_same_way_and_none_waits_in_vain(size: int, share: float) -> None:
    ways = set()
    for seed in range(150):
        world = World(seed, size, 12, share)
        world.run()
        assert all(rank.ways == world.ranks[0].ways for rank in world.ranks)
        ways.update(world.ranks[0].ways)
    assert ways == ({"met"} if share == 1.0 else {"met", "announced"})
