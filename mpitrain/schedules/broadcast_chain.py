"""Chain broadcast: segments follow each other from rank to rank.

Terms: the buffer is cut into `num_segments` chunks, here called segments; `vrank` is the rank
counted from the root, and the place in the chain.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from itertools import repeat

from mpitrain.schedules.algorithm import Algorithm
from mpitrain.schedules.rotation import to_vrank
from mpitrain.schedules.rounds import Receive, Round, Send

__all__ = ["ALGORITHM", "broadcast_chain"]


def broadcast_chain(rank: int, size: int, root: int, num_segments: int) -> Iterator[Round]:
    """Yield the rounds of `rank`: what it receives in a round it passes on in the next.

    Requires: nothing. Any `size` and `root`; any positive `num_segments`.
    Cost: with s segments s + p - 2 rounds (p > 1); all ranks but the last one of the
        chain send n bytes.
    Source: Pjesivac-Grbovic et al., Cluster Computing 10(2):127-143, 2007,
        doi:10.1007/s10586-007-0012-0.
    """
    vrank = to_vrank(rank, root, size)
    left, right = (rank - 1) % size, (rank + 1) % size
    # The root (vrank 0) sends segment i in round i, and each rank follows a round later; so
    # this one receives segment 0 in round vrank - 1 and sends the last one, or would
    # if it had anyone to send it to, in round vrank + num_segments - 1.
    begin = max(vrank - 1, 0)
    end = min(vrank + num_segments, _rounds(size, num_segments))
    yield from repeat(Round(), begin)
    for sent in range(begin - vrank, end - vrank):
        received = sent + 1
        sends: tuple[Send, ...] = ()
        receives: tuple[Receive, ...] = ()
        if vrank < size - 1 and sent >= 0:
            sends = (Send(right, sent, sent + 1),)
        if vrank > 0 and received < num_segments:
            receives = (Receive(left, received, received + 1),)
        yield Round(sends, receives)
    yield from repeat(Round(), _rounds(size, num_segments) - end)


def _rounds(size: int, num_segments: int) -> int:
    # The last segment leaves the root in round num_segments - 1 and makes size - 1 hops.
    return num_segments + size - 2 if size > 1 else 0


ALGORITHM = Algorithm(
    collective="broadcast",
    name="chain",
    schedule=broadcast_chain,
    num_chunks=lambda _, num_segments: num_segments,
    rounds=_rounds,
    volume=lambda size, _: Fraction(int(size > 1)),
    rounds_formula="s+p-2; p > 1",
    volume_formula="1; p > 1",
    restrictions="none",
    source=("Pjesivac-Grbovic et al., Cluster Computing 10(2):127-143, 2007, doi:10.1007/s10586-007-0012-0"),
    takes_root=True,
    takes_segments=True,
)
