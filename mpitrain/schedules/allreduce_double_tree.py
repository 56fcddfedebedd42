"""Double tree all-reduce: two pipelined binary trees, half of the data on each.

Terms: the buffer is cut into 2 * `num_segments` chunks, here called segments; the first half of them
belong to the first tree, the others to the second. Both trees have the same
shape, but the labels of the second are shifted by one rank, so that a rank which is
interior (an even label) in one is a leaf (an odd label) in the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

from mpitrain.schedules.algorithm import Algorithm
from mpitrain.schedules.fold import floor_log2
from mpitrain.schedules.inorder_tree import inorder_node
from mpitrain.schedules.rounds import Receive, Round, Send

__all__ = ["ALGORITHM", "allreduce_double_tree"]


def allreduce_double_tree(rank: int, size: int, num_segments: int) -> Iterator[Round]:
    """Yield the rounds of `rank`; sums go up both trees while results come down.

    Requires: a commutative operation. Any `size`; any positive `num_segments` per tree.
    Cost: with s segments and m = floor(log2 p), s + 2m - 1 rounds; a rank sends at most
        min(p, 4)/2 * n bytes (p > 1).
    Determinism: same bits on all ranks, as each segment is reduced at a root and then copied.
    Source: Sanders, Speck and Traeff, Parallel Computing 35(12):581-594, 2009,
        doi:10.1016/j.parco.2009.09.001. They colour the edges so that a rank sends
        one message at a time; we let the up to four segments of a round share the port.
    """
    trees = [_Tree(rank, size, num_segments, shift) for shift in (0, 1)]
    for round_index in range(_rounds(size, num_segments)):
        parts = [tree.round_at(round_index) for tree in trees]
        yield Round(
            sends=tuple(send for part in parts for send in part.sends),
            receives=tuple(receive for part in parts for receive in part.receives),
        )


class _Tree:
    """The part of a rank in one of the two trees."""

    def __init__(self, rank: int, size: int, num_segments: int, shift: int) -> None:
        self._size = size
        self._shift = shift
        self._num_segments = num_segments
        self._max_depth = floor_log2(size)
        node = inorder_node((rank + shift) % size + 1, size)
        self._parent = None if node.parent is None else self._rank_of(node.parent)
        self._children = [self._rank_of(child) for child in node.children]
        self._depth = node.depth

    def _rank_of(self, label: int) -> int:
        return (label - 1 - self._shift) % self._size

    def round_at(self, round_index: int) -> Round:
        # A node at the greatest depth sends segment 0 up in round 0, and each level
        # follows one round later; so the children of the root send it in round
        # max_depth - 1, and in round max_depth the root sends it down.
        up = round_index - (self._max_depth - self._depth)
        down = round_index - (self._max_depth + self._depth)
        sends: list[Send] = []
        receives: list[Receive] = []
        # What the children send now goes up in the next round, hence segment up + 1; what
        # the parent sends now goes down in the next round, hence segment down + 1.
        if self._is_segment(up + 1):
            receives += [Receive(c, *self._chunk(up + 1), reduce=True) for c in self._children]
        if self._is_segment(down):
            sends += [Send(child, *self._chunk(down)) for child in self._children]
        if self._parent is not None and self._is_segment(up):
            sends.append(Send(self._parent, *self._chunk(up)))
        if self._parent is not None and self._is_segment(down + 1):
            receives.append(Receive(self._parent, *self._chunk(down + 1)))
        return Round(tuple(sends), tuple(receives))

    def _is_segment(self, index: int) -> bool:
        return 0 <= index < self._num_segments

    def _chunk(self, segment: int) -> tuple[int, int]:
        start = self._shift * self._num_segments + segment
        return start, start + 1


def _rounds(size: int, num_segments: int) -> int:
    # The last segment starts num_segments - 1 rounds after the first, climbs max_depth
    # levels and descends as many.
    max_depth = floor_log2(size)
    return num_segments - 1 + 2 * max_depth if size > 1 else 0


ALGORITHM = Algorithm(
    collective="allreduce",
    name="double_tree",
    schedule=allreduce_double_tree,
    num_chunks=lambda _, num_segments: 2 * num_segments,
    rounds=_rounds,
    # An interior rank with two children and a parent sends three halves of the data, and
    # one half more as a leaf of the other tree; the first such rank needs p >= 4.
    volume=lambda size, _: Fraction(min(size, 4), 2) if size > 1 else Fraction(0),
    rounds_formula="s+2m-1; m = floor(log2 p), p > 1",
    volume_formula="min(p, 4)/2; p > 1",
    restrictions="commutative operation",
    source=("Sanders, Speck and Traeff, Parallel Computing 35(12):581-594, 2009, doi:10.1016/j.parco.2009.09.001"),
    takes_segments=True,
)
