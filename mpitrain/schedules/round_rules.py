"""What a single round of a single rank must obey, whatever the others do."""

from __future__ import annotations

from mpitrain.schedules.proof_error import ProofError
from mpitrain.schedules.rounds import Receive, Round, Send

__all__ = ["check_round"]


def check_round(current: Round, rank: int, round_index: int, size: int, num_chunks: int) -> None:
    """Check peers, chunk numbers and overlaps of one round.

    A chunk that a received one replaces must have no other part in the round. Were it also sent,
    the executor would have to copy it first, as sends read the chunks as they were; were
    it received twice, the order would decide. A chunk into which received ones are reduced may be
    both, since the executor receives those in scratch memory.

    Raises:
        ProofError: A rule is broken.
    """
    touched = 0
    for send in current.sends:
        touched |= _check_message(send, rank, round_index, size, num_chunks)
    reduced = 0
    replaced = 0
    for receive in current.receives:
        chunks = _check_message(receive, rank, round_index, size, num_chunks)
        if receive.reduce:
            reduced |= chunks
        elif clash := chunks & (touched | replaced):
            chunk = _lowest(clash)
            raise ProofError(
                f"rank {rank}, round {round_index}, peer {receive.peer}, chunk {chunk}: "
                "a replaced chunk is also sent or received in the round"
            )
        else:
            replaced |= chunks
    if clash := reduced & replaced:
        raise ProofError(
            f"rank {rank}, round {round_index}, chunk {_lowest(clash)}: "
            "a chunk is both replaced and reduced into in the round"
        )


def _check_message(message: Send | Receive, rank: int, round_index: int, size: int, num_chunks: int) -> int:
    """Check one message; return its chunks as a bit mask."""
    peer, start, stop = message.peer, message.start, message.stop
    if peer == rank or not 0 <= peer < size:
        raise ProofError(
            f"rank {rank}, round {round_index}: no such peer, got {peer}; it must be another rank from 0 to {size - 1}"
        )
    if not 0 <= start <= stop <= num_chunks:
        raise ProofError(
            f"rank {rank}, round {round_index}, peer {peer}: no such chunks, "
            f"got [{start}:{stop}]; there are {num_chunks}"
        )
    return (1 << stop) - (1 << start)


def _lowest(mask: int) -> int:
    return (mask & -mask).bit_length() - 1
