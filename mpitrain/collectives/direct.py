"""The direct algorithm: ranks of one node reduce by load and store, without messages.

Every rank owns a *slice* of the buffer. It reduces its slice over the buffers of all ranks of the node, in rank order,
and stores the result into all of them. The slice is worked through in blocks that stay in the cache, so that memory is
read once per peer and written once per peer: that is the limit of the memory's bandwidth.

Arrays that the node does not share are read by the peers where that can be (see `reading`); else they pass through
*staging* memory that it does, in pieces small enough to stay in the cache. On several nodes each rank reduces its slice
over the nodes before it stores it (*hierarchical*), so a node's network carries every byte once; the pieces are then on
different stages at the same time.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mpitrain.collectives.executor import Task
from mpitrain.collectives.gate import Gate
from mpitrain.collectives.node import Flags, Node
from mpitrain.collectives.reduction import Reduction
from mpitrain.errors import CommError

__all__ = [
    "EMPTIED",
    "FILLED",
    "NEXT_STEPS",
    "NUM_STAGED",
    "REDUCED",
    "Across",
    "Stages",
    "finish_across",
    "keeping",
    "pipeline",
    "shared_allreduce",
    "slice_bounds",
    "staged_allreduce",
    "staged_count",
    "wait",
]

# With one block of a peer beside it, a block stays in a core's own cache. Of 64 KiB to 1 MiB this size was the fastest.
_BLOCK_NBYTES = 512 << 10
# Slices begin on cache lines, so that no two ranks write to one.
_LINE_NBYTES = 64
# How many pieces the staging memory holds.
NUM_STAGED = 4
# How long a piece of a shared buffer is on its way across nodes, and how many are at once.
_PIECE_NBYTES = 1 << 20
_NUM_ACROSS = 4

# Phases of an operation, each with flags of its own.
FILLED, REDUCED, EMPTIED = range(3)
# What a rank does when all have ended a phase.
NEXT_STEPS = ("reduce", "unpack", "pack")


class Across(Protocol):
    """Reduces a slice over the nodes: over the ranks that own the same slice, one of each node."""

    num_slices: int
    """Number of slices: the ranks of the smallest node. Further ranks of larger nodes own none."""

    def allreduce(self, data: NDArray[Any], reduction: Reduction, tag: int) -> Task[None]:
        """Return the task that reduces `data` in place; `tag` is equal on all, and different for what is in flight."""


def shared_allreduce(
    node: Node, buffers: Sequence[NDArray[Any]], reduction: Reduction, number: int, across: Across | None
) -> Task[None]:
    """Reduce over buffers that the node shares, in place.

    Args:
        node: This rank's node.
        buffers: Of each rank of the node, by rank; of one length on all nodes.
        reduction: Same on every rank.
        number: Of the operation; the same on every rank, larger than those before.
        across: How slices are reduced over the nodes; None where there is only one.

    Cost: each rank reads p slices and writes p, of n/p bytes each, where p is the number of ranks of the node.
    Determinism: reduced in rank order; same bits on all ranks, run after run.
    """
    flags, own = node.flags, buffers[node.rank]
    count = own.size
    piece_count = count if across is None else max(1, _PIECE_NBYTES // own.itemsize)
    num_pieces = -(-count // piece_count) if count else 0

    def chain(piece: int) -> Task[None]:
        first = piece * piece_count
        length = min(piece_count, count - first)
        begin, end = slice_bounds(length, node, node.rank, own.itemsize, across)
        parts = [buffer[first + begin : first + end] for buffer in buffers]
        if across is None:
            yield from _reduce_blocks(parts, parts, reduction, is_final=True)
            return
        mine = parts[node.rank]
        yield from _reduce_blocks(parts, [mine], reduction, is_final=False)
        yield from finish_across(mine, reduction, number, piece, across)
        for index, part in enumerate(parts):
            if index != node.rank:
                part[:] = mine

    flags.signal(FILLED, number)
    yield from wait(flags, FILLED, number)
    yield from pipeline((chain(piece) for piece in range(num_pieces)), _NUM_ACROSS)
    with keeping(flags, REDUCED, number):
        yield from wait(flags, REDUCED, number)


def staged_allreduce(
    node: Node,
    array: NDArray[Any],
    reduction: Reduction,
    number: int,
    across: Across | None,
    *,
    gate: Gate | None = None,
) -> Task[None]:
    """Reduce an ordinary array, in place, through the staging memory of the node.

    Arguments as for `shared_allreduce`, and the gate of the array if that has not arrived yet. No other operation may
    use the staging memory meanwhile.

    Cost: the array is read once and written once, and what others need of it passes through memory that stays in the
        cache.
    Determinism: reduced in rank order; same bits on all ranks, run after run.
    """
    staging, piece_count = node.staging(array.dtype), staged_count(node, array.dtype)
    flags = node.flags

    stages = Stages(flags, number)
    others = [owner for owner in range(node.size) if owner != node.rank]

    # All pieces but the last have the same.
    @functools.cache
    def bounds_of(length: int) -> list[tuple[int, int]]:
        return [slice_bounds(length, node, owner, array.itemsize, across) for owner in range(node.size)]

    def chain(piece: int) -> Task[None]:
        first, slot = piece * piece_count, piece % NUM_STAGED * piece_count
        length = min(piece_count, array.size - first)
        bounds = bounds_of(length)
        here = [array[first + begin : first + end] for begin, end in bounds]
        there = [slice(slot + begin, slot + end) for begin, end in bounds]
        if piece >= NUM_STAGED:
            yield from stages.left_by_all(EMPTIED, piece - NUM_STAGED)
        else:
            yield from wait(flags, EMPTIED, *previous)
        if gate is not None:
            yield from gate.until(first + length)
        for owner in others:
            staging[node.rank][there[owner]] = here[owner]
        yield from stages.leave(FILLED, piece)
        yield from stages.left_by_all(FILLED, piece)
        mine, shown = here[node.rank], staging[node.rank][there[node.rank]]
        sources = [mine if owner == node.rank else memory[there[node.rank]] for owner, memory in enumerate(staging)]
        if across is None:
            yield from _reduce_blocks(sources, [mine, shown], reduction, is_final=True)
        else:
            yield from _reduce_blocks(sources, [mine], reduction, is_final=False)
            yield from finish_across(mine, reduction, number, piece, across)
            shown[:] = mine
        yield from stages.leave(REDUCED, piece)
        yield from stages.left_by_all(REDUCED, piece)
        for owner in others:
            here[owner][:] = staging[owner][there[owner]]
        if gate is not None:
            gate.give(first, first + length)
        yield from stages.leave(EMPTIED, piece)

    num_pieces = -(-array.size // piece_count)
    previous = node.last_staged
    if num_pieces:
        node.last_staged = (number, num_pieces - 1)
    yield from pipeline((chain(piece) for piece in range(num_pieces)), NUM_STAGED)


def staged_count(node: Node, storage: np.dtype[Any]) -> int:
    """Return how many elements of an ordinary array a piece has; the same on all nodes."""
    return node.staging_nbytes // storage.itemsize // NUM_STAGED


class Stages:
    """Lets the pieces of one operation leave each stage in order, so that a flag's count of pieces only grows."""

    def __init__(self, flags: Flags, number: int) -> None:
        self._flags = flags
        self._number = number
        self._next = [0, 0, 0]

    def left_by_all(self, stage: int, piece: int) -> Task[None]:
        """Wait until all ranks have left a stage with a piece."""
        return wait(self._flags, stage, self._number, piece)

    def leave(self, stage: int, piece: int) -> Task[None]:
        """Say, when it is the piece's turn, that this rank has done its part of a stage."""
        while self._next[stage] != piece:
            yield False
        self._flags.signal(stage, self._number, piece)
        self._next[stage] = piece + 1


def finish_across(mine: NDArray[Any], reduction: Reduction, number: int, piece: int, across: Across) -> Task[None]:
    """Reduce this rank's slice of a piece over the nodes."""
    if mine.size:
        yield from across.allreduce(mine, reduction, number * _NUM_ACROSS + piece % _NUM_ACROSS)
        reduction.finish(mine)


def _reduce_blocks(
    sources: Sequence[NDArray[Any]], targets: Sequence[NDArray[Any]], reduction: Reduction, *, is_final: bool
) -> Iterator[bool]:
    """Reduce the sources, in order, block by block, and store the result into the targets.

    Yields after each block, so that whoever drives can advance other operations.
    """
    count = sources[0].size
    block_count = _BLOCK_NBYTES // sources[0].itemsize
    if len(sources) == 1 and sources[0] is targets[0] and not is_final:
        return  # alone on the node
    # Adding straight into a target saves a pass. With more than two sources only the first of them can take the sum:
    # another one would be overwritten before it is added.
    in_place = len(sources) == 2 or targets[0] is sources[0]
    scratch = None if in_place else np.empty(min(block_count, count), sources[0].dtype)
    for first in range(0, count, block_count):
        last = min(first + block_count, count)
        total = targets[0][first:last] if scratch is None else scratch[: last - first]
        reduction.combine([source[first:last] for source in sources], total)
        if is_final:
            reduction.finish(total)
        for target in targets if scratch is not None else targets[1:]:
            target[first:last] = total
        yield True


def slice_bounds(count: int, node: Node, owner: int, itemsize: int, across: Across | None) -> tuple[int, int]:
    """Return begin and end, in elements, of a rank's slice of `count` elements."""
    num_slices = node.size if across is None else across.num_slices
    if owner >= num_slices:
        return count, count
    line = max(1, _LINE_NBYTES // itemsize)
    # As `even_counts` of the lines.
    share, extra = divmod(-(-count // line), num_slices)
    begin = (owner * share + min(owner, extra)) * line
    length = (share + (owner < extra)) * line
    return min(begin, count), min(begin + length, count)


def pipeline(chains: Iterable[Task[None]], depth: int) -> Task[None]:
    """Advance chains in turn; each begins when the one `depth` places before it has ended.

    So what a chain takes by its number modulo `depth`, memory or a tag, no other one in flight has.
    """
    waiting = iter(chains)
    window: deque[Task[None] | None] = deque()
    while True:
        while window and window[0] is None:
            window.popleft()
        while len(window) < depth and (chain := next(waiting, None)) is not None:
            window.append(chain)
        if not window:
            return
        moved = False
        for place, chain in enumerate(window):
            if chain is not None:
                try:
                    moved |= next(chain)
                except StopIteration:
                    window[place] = None
                    moved = True
        if any(window):
            yield moved


@contextmanager
def keeping(flags: Flags, phase: int, number: int) -> Iterator[None]:
    """Say that this rank has ended the last phase of an operation; in the `with` block it waits until all others have.

    Until then they may read its array, which nobody may change. Whoever cannot wait tells them, as all else looks well.

    Raises:
        CommError: Another rank could not wait.
    """
    try:
        flags.signal(phase, number)
        yield
    except BaseException:
        flags.take_back(number)
        raise
    if flags.was_taken_back(number):
        raise CommError("collective: a rank was interrupted while others read its array; see what it says")


def wait(flags: Flags, phase: int, number: int, part: int = 0) -> Task[None]:
    """Wait until all ranks of the node have ended a phase of an operation."""
    while not flags.reached(phase, number, part):
        yield False
