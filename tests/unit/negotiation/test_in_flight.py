"""Which names the operations of one rank hold, and what of them waits for a decision."""

from __future__ import annotations

from typing import Any

import pytest

from mpitrain.errors import CommError
from mpitrain.negotiation.announcement import Announcement, Decision
from mpitrain.negotiation.execution import Entry
from mpitrain.negotiation.in_flight import InFlight

CLOSING = Decision((), reason="left", closed="rank 1 left")


@pytest.fixture
def said() -> list[Announcement]:
    """What was announced."""
    return []


@pytest.fixture
def in_flight(said: list[Announcement]) -> InFlight:
    return InFlight(said.append)


def entry_of(name: str, collective: str = "allreduce", problem: str = "") -> Entry:
    handle: Any = None
    return Entry(Announcement(name, collective, problem=problem), [], False, handle, 1.0)


def test_a_name_is_held_until_its_operation_is_forgotten(in_flight, said) -> None:
    entry = entry_of("a")
    assert in_flight.enter(entry, None) is None
    assert said == [entry.announcement]
    assert in_flight.awaits_decision
    assert in_flight.waiting().undecided == [("a", 1.0)]
    with pytest.raises(ValueError, match="same name"):
        in_flight.enter(entry_of("a"), None)
    assert in_flight.take(["a", "of others"]) == ([entry], None)
    # Decided, it is still under way.
    assert in_flight.holds("a")
    assert not in_flight.awaits_decision
    in_flight.forget([entry])
    assert not in_flight.holds("a")
    assert in_flight.enter(entry_of("a"), None) is None


def test_a_reserved_name_is_held_before_anything_is_announced(in_flight, said) -> None:
    reservation = in_flight.reserve("a")
    assert in_flight.holds("a")
    # It is announced before this rank joins.
    assert not in_flight.join(lambda _step: None)
    assert said == []
    assert not in_flight.awaits_decision
    for start in (lambda: in_flight.reserve("a"), lambda: in_flight.enter(entry_of("a"), None)):
        with pytest.raises(ValueError, match="same name"):
            start()
    entry = entry_of("a")
    in_flight.enter(entry, None, reservation)
    assert said == [entry.announcement]
    assert in_flight.join(lambda _step: None)
    in_flight.end_join()
    # It is the operation's now.
    in_flight.release(reservation)
    assert in_flight.holds("a")
    in_flight.forget([entry])
    assert not in_flight.holds("a")


def test_a_reservation_that_is_given_up_frees_no_other_ones_name(in_flight, said) -> None:
    given_up = in_flight.reserve("a")
    in_flight.release(given_up)
    assert not in_flight.holds("a")
    in_flight.reserve("a")
    in_flight.release(given_up)
    assert in_flight.holds("a")


def test_a_reservation_ends_where_nothing_is_decided_any_more(in_flight, said) -> None:
    reservation = in_flight.reserve("a")
    in_flight.close(CLOSING)
    assert in_flight.enter(entry_of("a"), None, reservation) is CLOSING
    assert not in_flight.holds("a")


def test_what_follows_a_refusal_is_announced_when_that_is_decided(in_flight, said) -> None:
    refusal, following = entry_of("a", problem="no room"), entry_of("a")
    in_flight.enter(refusal, None)
    assert not in_flight.holds("a")
    assert not in_flight.awaits_decision
    in_flight.enter(following, None)
    assert said == [refusal.announcement]
    assert in_flight.awaits_decision
    assert in_flight.waiting() == ([], [("a", 1.0)])
    # What was decided was the refusal.
    assert in_flight.take(["a"]) == ([], None)
    assert said == [refusal.announcement, following.announcement]
    assert in_flight.take(["a"]) == ([following], None)


def test_a_rank_that_has_joined_starts_nothing(in_flight, said) -> None:
    in_flight.join(print)
    with pytest.raises(ValueError, match="on a rank that has joined"):
        in_flight.enter(entry_of("a"), None)
    join = entry_of("join", "join")
    in_flight.enter(join, None)
    assert in_flight.take([]) == ([], print)
    # That is no operation whose delay anybody would be told of.
    assert in_flight.waiting() == ([], [])
    assert in_flight.take(["join"]) == ([join], print)
    in_flight.end_join()
    assert in_flight.enter(entry_of("a"), None) is None


def test_nothing_waits_once_it_is_closed(in_flight, said) -> None:
    waiting, behind = entry_of("a"), entry_of("b")
    for entry in (waiting, entry_of("b", problem="no room"), behind):
        in_flight.enter(entry, None)
    assert in_flight.closing is None
    assert in_flight.close(CLOSING) == (True, [waiting, behind])
    assert in_flight.close(Decision((), closed="later")) == (False, [])
    assert in_flight.closing is CLOSING
    assert in_flight.enter(entry_of("c"), None) is CLOSING
    assert not in_flight.holds("c")
    assert not in_flight.awaits_decision


def test_what_cannot_be_announced_is_not_in_flight() -> None:
    def refuse(_: Announcement) -> None:
        raise CommError("notice: the network is gone")

    in_flight = InFlight(refuse)
    with pytest.raises(CommError):
        in_flight.enter(entry_of("a"), None)
    assert not in_flight.holds("a")
    assert not in_flight.awaits_decision


def test_what_is_taken_back_waits_for_no_decision(in_flight, said) -> None:
    step = entry_of("step.0.1", "step")
    in_flight.enter(step, None)
    assert in_flight.take_back("step.0.1") is step
    assert in_flight.take_back("step.0.1") is None
    assert in_flight.take(["step.0.1"]) == ([], None)
