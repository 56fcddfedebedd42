"""The prover finds what is wrong with broken schedules."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from fractions import Fraction

import pytest

from mpitrain.schedules import (
    ALGORITHMS,
    Algorithm,
    ProofError,
    Receive,
    Round,
    Send,
    find_algorithm,
    prove,
)

RING = find_algorithm("allreduce", "ring")
Edit = Callable[[int, int, Round], Round]


def edited(algorithm: Algorithm, edit: Edit) -> Algorithm:
    """Return `algorithm` with each round replaced by `edit(rank, round_index, round)`."""

    def schedule(rank: int, *arguments: int) -> Iterator[Round]:
        for round_index, current in enumerate(algorithm.schedule(rank, *arguments)):
            yield edit(rank, round_index, current)

    return replace(algorithm, schedule=schedule)


def made_of(algorithm: Algorithm, rounds_by_rank: list[list[Round]]) -> Algorithm:
    """Return `algorithm` with its rounds written out."""
    return replace(algorithm, schedule=lambda rank, *_: iter(rounds_by_rank[rank]))


def at(rank: int, round_index: int, changed: Callable[[Round], Round]) -> Edit:
    """Return an edit that changes one round of one rank."""

    def edit(this_rank: int, this_round: int, current: Round) -> Round:
        return changed(current) if (this_rank, this_round) == (rank, round_index) else current

    return edit


def test_unchanged_schedule_is_proved_through_the_same_path() -> None:
    proof = prove(edited(RING, lambda rank, round_index, current: current), 4)
    assert (proof.num_rounds, proof.max_messages, proof.num_messages) == (6, 6, 24)
    assert proof.volume == Fraction(3, 2)


def test_other_chunk_sent_than_received_is_found() -> None:
    def other_chunk(current: Round) -> Round:
        (send,) = current.sends
        chunk = (send.start + 2) % 4
        return current._replace(sends=(Send(send.peer, chunk, chunk + 1),))

    with pytest.raises(ProofError, match=r"rank 1, round 2, peer 2: chunks \[0:1\] are sent, got \[2:3\]"):
        prove(edited(RING, at(1, 2, other_chunk)), 4)


def test_chunks_swapped_on_both_sides_are_found() -> None:
    def swap(rank: int, round_index: int, current: Round) -> Round:
        # Only between ranks 1 and 2, and consistently.
        def swapped(start: int) -> tuple[int, int]:
            chunk = start ^ 1
            return chunk, chunk + 1

        if round_index == 3 and rank == 1:
            return current._replace(sends=(Send(2, *swapped(current.sends[0].start)),))
        if round_index == 3 and rank == 2:
            return current._replace(receives=(Receive(1, *swapped(current.receives[0].start)),))
        return current

    with pytest.raises(ProofError, match=r"wrong content|also sent"):
        prove(edited(RING, swap), 4)


def test_contribution_counted_twice_is_found() -> None:
    # Both exchanges are over the same distance, so that a rank gets its own data back.
    doubling = find_algorithm("allreduce", "recursive_doubling")
    again = [Round((Send(rank ^ 1, 0, 1),), (Receive(rank ^ 1, 0, 1, reduce=True),)) for rank in range(4)]
    broken = made_of(doubling, [[current, current] for current in again])
    with pytest.raises(ProofError, match=r"rank \d, round 1, peer \d, chunk 0: contributions count twice"):
        prove(broken, 4)


def test_one_contribution_in_place_of_another_is_found() -> None:
    # Rank 2 replaces where it should reduce, so that its own contribution is lost.
    def forget(current: Round) -> Round:
        return current._replace(receives=(current.receives[0]._replace(reduce=False),))

    with pytest.raises(ProofError, match=r"at the end, chunk \d: wrong content, got 0x\w+; it must be 0xf"):
        prove(edited(RING, at(2, 1, forget)), 4)


def test_missing_receive_is_found() -> None:
    broken = edited(RING, at(3, 5, lambda current: current._replace(receives=())))
    with pytest.raises(
        ProofError,
        match=r"rank 2, round 5, peer 3: chunks \[0:1\] are not received, and the peer is at its end",
    ):
        prove(broken, 4)


def test_missing_send_is_found() -> None:
    broken = edited(RING, at(0, 5, lambda current: current._replace(sends=())))
    with pytest.raises(ProofError, match=r"rank 1, round 5, peer 0: chunks \[\d:\d\] are not sent"):
        prove(broken, 4)


def test_cycle_of_blocking_sends_is_found() -> None:
    gather = find_algorithm("allgather", "ring")
    # All send first and receive in the round after: fine if messages were buffered.
    cyclic = [
        [
            Round(sends=(Send((rank + 1) % 3, rank, rank + 1),)),
            Round(receives=(Receive((rank - 1) % 3, (rank - 1) % 3, (rank - 1) % 3 + 1),)),
        ]
        for rank in range(3)
    ]
    with pytest.raises(ProofError, match=r"deadlock: rank 0, round 0, peer 1: .* rank 1, round 0, peer 2: .* rank 2"):
        prove(made_of(gather, cyclic), 3)


def test_message_received_in_another_round_is_found() -> None:
    late = [
        [Round(), Round(sends=(Send(1, 0, 1),))],
        [Round(receives=(Receive(0, 0, 1),)), Round()],
    ]
    with pytest.raises(ProofError, match=r"rank 0, round 1, peer 1: .* in another round, got 0"):
        prove(made_of(find_algorithm("broadcast", "binomial"), late), 2)


def test_one_round_more_on_one_rank_is_found() -> None:
    def longer(rank: int, size: int) -> Iterator[Round]:
        yield from RING.schedule(rank, size)
        if rank == 2:
            yield Round()

    with pytest.raises(ProofError, match="rank 2: ranks differ in their number of rounds, got 7; rank 0 has 6"):
        prove(replace(RING, schedule=longer), 4)


def test_one_round_more_on_all_ranks_is_found() -> None:
    def longer(rank: int, size: int) -> Iterator[Round]:
        yield from RING.schedule(rank, size)
        yield Round()

    with pytest.raises(ProofError, match="rounds: 6 are claimed, got 7"):
        prove(replace(RING, schedule=longer), 4)


def test_wrong_claim_of_volume_is_found() -> None:
    with pytest.raises(ProofError, match="volume: 1 n is claimed, got 3/2 n"):
        prove(replace(RING, volume=lambda size, _: Fraction(1)), 4)


def test_missing_last_round_is_found() -> None:
    def shorter(rank: int, size: int) -> Iterator[Round]:
        yield from list(RING.schedule(rank, size))[:-1]

    with pytest.raises(ProofError, match="wrong content"):
        prove(replace(RING, schedule=shorter), 4)


@pytest.mark.parametrize(
    ("current", "message"),
    [
        (Round(sends=(Send(0, 0, 1),)), "no such peer, got 0"),
        (Round(sends=(Send(4, 0, 1),)), "no such peer, got 4; it must be another rank from 0 to 3"),
        (Round(receives=(Receive(-1, 0, 1),)), "no such peer, got -1"),
        (Round(sends=(Send(1, 3, 5),)), r"peer 1: no such chunks, got \[3:5\]; there are 4"),
        (Round(sends=(Send(1, 2, 1),)), r"no such chunks, got \[2:1\]"),
        (Round(sends=(Send(1, 0, 3),), receives=(Receive(2, 2, 4),)), "peer 2, chunk 2: a replaced chunk"),
        (Round(receives=(Receive(1, 0, 3), Receive(2, 1, 2))), "peer 2, chunk 1: a replaced chunk"),
        (Round(receives=(Receive(1, 0, 2), Receive(2, 1, 3, reduce=True))), "chunk 1: a chunk is both"),
        (Round(receives=(Receive(1, 0, 2, reduce=True), Receive(2, 1, 3))), "chunk 1: a chunk is both"),
    ],
)
def test_round_that_breaks_a_rule_is_found(current: Round, message: str) -> None:
    broken = edited(RING, at(0, 1, lambda _: current))
    with pytest.raises(ProofError, match=f"allreduce_ring, 4 ranks.*: rank 0, round 1.*{message}"):
        prove(broken, 4)


def test_undefined_chunk_sent_is_found() -> None:
    def early(rank: int, size: int) -> Iterator[Round]:
        yield from reversed(list(find_algorithm("broadcast", "binomial").schedule(rank, size, 0)))

    broken = replace(find_algorithm("broadcast", "binomial"), schedule=lambda rank, size, _: early(rank, size))
    with pytest.raises(ProofError, match=r"rank 2, round 0, peer 3, chunk 0: an undefined chunk is sent"):
        prove(broken, 4)


def test_reduction_in_an_allgather_is_found() -> None:
    def reduce(rank: int, round_index: int, current: Round) -> Round:
        return current._replace(receives=tuple(each._replace(reduce=True) for each in current.receives))

    with pytest.raises(ProofError, match="allgather has nothing to reduce"):
        prove(edited(find_algorithm("allgather", "ring"), reduce), 3)


def test_alltoall_stored_in_the_wrong_place_is_found() -> None:
    # Ranks 1 and 2 exchange the places of what rank 0 gets from them; nothing else changes.
    def misplace(rank: int, round_index: int, current: Round) -> Round:
        if rank != 0:
            return current
        (receive,) = current.receives
        source = 3 - receive.peer
        return current._replace(receives=(Receive(receive.peer, 3 + source, 4 + source),))

    with pytest.raises(ProofError, match="rank 0, at the end, chunk 4: wrong content"):
        prove(edited(find_algorithm("alltoall", "pairwise"), misplace), 3)


def test_alltoall_with_other_count_on_receiver_is_found() -> None:
    def longer(current: Round) -> Round:
        (receive,) = current.receives
        return current._replace(receives=(receive._replace(stop=receive.stop + 1),))

    with pytest.raises(ProofError, match=r"chunks \[0:1\] are sent, got \[4:6\]"):
        prove(edited(find_algorithm("alltoall", "pairwise"), at(0, 1, longer)), 3)


def test_barrier_that_some_leave_early_is_found() -> None:
    def shorter(rank: int, size: int) -> Iterator[Round]:
        yield from list(find_algorithm("barrier", "dissemination").schedule(rank, size))[:-1]

    with pytest.raises(ProofError, match="rank 0, at the end, chunk 0: wrong content, got 0x1d; it must be 0x1f"):
        prove(replace(find_algorithm("barrier", "dissemination"), schedule=shorter), 5)


# The allgather of the scatter-allgather broadcast brings some ranks what the scatter left there.
NEEDS_EVERY_MESSAGE = [
    algorithm
    for row in ALGORITHMS.values()
    for algorithm in row.values()
    if algorithm.qualified_name != "broadcast_scatter_allgather"
]


@pytest.mark.parametrize("algorithm", NEEDS_EVERY_MESSAGE, ids=lambda each: each.qualified_name)
@pytest.mark.parametrize("size", [2, 5, 6, 8])
def test_any_message_left_out_is_found(algorithm: Algorithm, size: int) -> None:
    ranks = [list(algorithm.rounds_of(rank, size, num_segments=2)) for rank in range(size)]
    for source, rounds in enumerate(ranks):
        for round_index, current in enumerate(rounds):
            for send in current.sends:
                # Of several messages to one peer the receives are listed in the same order.
                position = [each for each in current.sends if each.peer == send.peer].index(send)
                receiver = ranks[send.peer][round_index]
                receive = [each for each in receiver.receives if each.peer == source][position]
                broken = [list(each) for each in ranks]
                broken[source][round_index] = without(current, send)
                broken[send.peer][round_index] = without(receiver, receive)
                with pytest.raises(ProofError, match=r"wrong content|undefined chunk"):
                    prove(made_of(algorithm, broken), size, num_segments=2)


def without(current: Round, message: Send | Receive) -> Round:
    return Round(
        sends=tuple(each for each in current.sends if each is not message),
        receives=tuple(each for each in current.receives if each is not message),
    )
