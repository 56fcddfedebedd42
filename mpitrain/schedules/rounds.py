"""What a schedule is made of: rounds of sends and receives over numbered chunks.

Terms: a buffer is cut into `num_chunks` *chunks*, numbered from 0. A *schedule* is a pure generator; called
with a `rank` and the `size` (and a `root` or a number of segments where the algorithm has one) it yields the
*rounds* of that rank in order. Every rank yields the same number of rounds, and what is sent in a round is
received in the same round, so a rank that has nothing to do in a round yields an empty one.

Meaning of one round: all its sends read the chunks as they were when the round began; received chunks replace
the local ones, or are reduced into them; the round is over when all its messages have arrived. Between one
source and one destination, messages of a round match in the order in which they are listed.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["Receive", "Round", "Send"]


class Send(NamedTuple):
    """Chunks `start` to `stop` (exclusive) go to `peer`; none of them: a bare signal."""

    peer: int
    start: int
    stop: int


class Receive(NamedTuple):
    """Chunks `start` to `stop` (exclusive) come from `peer` and replace the local ones.

    With `reduce` they are reduced into the local chunks: local = op(local, received).
    """

    peer: int
    start: int
    stop: int
    reduce: bool = False


class Round(NamedTuple):
    """One exchange of a rank with its peers."""

    sends: tuple[Send, ...] = ()
    receives: tuple[Receive, ...] = ()
