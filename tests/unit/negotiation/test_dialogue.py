"""What ranks say to rank 0 about named operations, and what it answers."""

from __future__ import annotations

import pytest

from mpitrain.comm import run_ranks
from mpitrain.config import Settings
from mpitrain.negotiation.announcement import Announcement, Decision
from mpitrain.negotiation.dialogue import Dialogue
from mpitrain.negotiation.stalls import Waiting

NOTHING = Waiting([], [])
SETTINGS = Settings(wait="sleep")


def talk(size, body, settings=SETTINGS):
    return run_ranks(size, lambda transport: body(transport.rank, Dialogue(transport, settings)))


def hear(dialogue, waiting=NOTHING):
    """Listen until there is something to carry out."""
    while True:
        _, decisions = dialogue.hear(lambda: waiting)
        if decisions:
            return decisions


def test_all_hear_the_same_decision():
    def body(rank, dialogue):
        assert dialogue.decides == (rank == 0)
        dialogue.announce(Announcement("a", "barrier"))
        return hear(dialogue)

    assert talk(3, body) == [[Decision(("a",))]] * 3


def test_what_a_rank_says_of_itself_is_taken_before_anything_is_decided():
    def body(rank, dialogue):
        for name in ("a", "b"):
            dialogue.announce(Announcement(name, "barrier"))
        assert dialogue.hear(lambda: NOTHING) == (True, [])
        assert dialogue.hear(lambda: NOTHING) == (True, [Decision(("a",)), Decision(("b",))])
        assert dialogue.hear(lambda: NOTHING) == (False, [])

    talk(1, body)


@pytest.mark.parametrize("leaver", [0, 1])
def test_all_others_hear_of_a_rank_that_leaves(leaver):
    def body(rank, dialogue):
        if rank == leaver:
            dialogue.tell_of_leaving("has had enough")
        # Rank 0 tells the others, and itself needs no telling.
        return [] if rank == leaver == 0 else hear(dialogue)

    closing = [Decision((), reason="left", closed=f"rank {leaver} has had enough")]
    assert talk(3, body) == [[] if rank == leaver == 0 else closing for rank in range(3)]


def test_a_rank_that_waits_for_rank_0_in_vain_gives_up(monkeypatch):
    from mpitrain.negotiation import stalls

    monkeypatch.setattr(stalls, "_GRACE_S", 0.0)

    def body(rank, dialogue):
        if rank == 0:
            return hear(dialogue)
        return hear(dialogue, Waiting([("a", 0.0)], []))

    theirs, own = talk(2, body, SETTINGS.replace(timeout_s=1.0))
    assert [each.reason for each in (*theirs, *own)] == ["left", "timeout"]
    assert "rank 1 has given up: a was not decided by rank 0" in theirs[0].closed
    assert own[0].closed.startswith("a was not decided by rank 0 within 1 s")
