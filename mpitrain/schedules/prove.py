"""Proof that an algorithm is correct for one size, by running it on symbols.

All ranks run at once over the contents of `mpitrain.schedules.contents`. Each rank is at its
own round: it posts all messages of the round and goes on when all of them are matched, a
send with a receive. So a send is synchronous: it completes only once it is received.

One order of running the ranks stands for all orders. No receive takes messages from any source,
so the i-th send from one rank to another can only match the i-th receive there
from it; and a rank that is able to go on stays able, whatever the others do. Hence
every order reaches the same last rounds and hands over the same data, and when one
order runs to the end, none can deadlock.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from mpitrain.schedules.algorithm import Algorithm
from mpitrain.schedules.contents import initial_contents, required_contents
from mpitrain.schedules.proof_error import ProofError
from mpitrain.schedules.simulation import Simulation

__all__ = ["Proof", "ProofError", "prove"]


@dataclass(frozen=True, kw_only=True)
class Proof:
    """What was proved, and what was counted on the way.

    Attributes:
        algorithm: The algorithm that is correct.
        size: The number of ranks for which it is.
        root: The root for which it is.
        num_segments: The number of segments for which it is.
        num_rounds: Rounds of every rank.
        num_messages: Messages of all ranks together.
        max_messages: The largest number of messages that any one rank sends.
        volume: The largest amount that any one rank sends, in units of n.
    """

    algorithm: Algorithm
    size: int
    root: int
    num_segments: int
    num_rounds: int
    num_messages: int
    max_messages: int
    volume: Fraction


def prove(algorithm: Algorithm, size: int, *, root: int = 0, num_segments: int = 1) -> Proof:
    """Prove that `algorithm` is correct and costs what it claims.

    Proved are: every rank ends with what the collective demands, no contribution twice; every
    send has its receive in the same round, with as many chunks and, unless the algorithm
    renumbers, the same ones; all ranks have the same number of rounds; no deadlock, even
    where a send waits for its receive; a chunk that is replaced in a round is neither sent nor
    received otherwise in it; counted rounds and volume equal those of the registry.

    Raises:
        ProofError: One of these is not so; the message names rank, round, peer and chunk.
    """
    simulation = Simulation(
        algorithm,
        [algorithm.rounds_of(rank, size, root=root, num_segments=num_segments) for rank in range(size)],
        [initial_contents(algorithm, rank, size, root=root, num_segments=num_segments) for rank in range(size)],
    )
    try:
        simulation.run()
        _check_contents(simulation, root, num_segments)
        return _check_claims(simulation, root, num_segments)
    except ProofError as error:
        subject = f"{algorithm.qualified_name}, {size} ranks, root {root}, {num_segments} segments"
        raise ProofError(f"{subject}: {error}") from None


def _check_contents(simulation: Simulation, root: int, num_segments: int) -> None:
    for rank, contents in enumerate(simulation.contents):
        required = required_contents(simulation.algorithm, rank, simulation.size, root=root, num_segments=num_segments)
        for chunk, content in required.items():
            if contents[chunk] != content:
                raise ProofError(
                    f"rank {rank}, at the end, chunk {chunk}: wrong content, "
                    f"got {contents[chunk]:#x}; it must be {content:#x}"
                )


def _check_claims(simulation: Simulation, root: int, num_segments: int) -> Proof:
    algorithm, size = simulation.algorithm, simulation.size
    num_rounds = simulation.num_rounds()
    claimed_rounds = algorithm.rounds(size, num_segments)
    if num_rounds != claimed_rounds:
        raise ProofError(f"rounds: {claimed_rounds} are claimed, got {num_rounds}")
    # A barrier has no chunks and so no unit; its volume is 0 whatever the unit.
    unit = algorithm.chunks_per_buffer(size, num_segments) or 1
    volume = Fraction(max(simulation.chunks_sent), unit)
    claimed_volume = algorithm.volume(size, num_segments)
    if volume != claimed_volume:
        raise ProofError(f"volume: {claimed_volume} n is claimed, got {volume} n")
    return Proof(
        algorithm=algorithm,
        size=size,
        root=root,
        num_segments=num_segments,
        num_rounds=num_rounds,
        num_messages=sum(simulation.messages_sent),
        max_messages=max(simulation.messages_sent),
        volume=volume,
    )
