"""All-reduce of ordinary arrays by ranks of a node that read each other's memory.

Where the kernel allows that (see `memory.cross_memory`), each rank reads its slice of the arrays of all others and
reduces it, then reads the slices that the others have reduced: every byte is copied once, by who needs it. Elsewhere,
where they are small, or where one of them cannot be read, arrays pass through staging memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpitrain.collectives.direct import (
    EMPTIED,
    NUM_STAGED,
    REDUCED,
    Across,
    Stages,
    finish_across,
    pipeline,
    slice_bounds,
    staged_count,
    wait,
)
from mpitrain.collectives.executor import Task
from mpitrain.collectives.gate import Gate
from mpitrain.collectives.node import Node
from mpitrain.collectives.reduction import Reduction
from mpitrain.collectives.selection import LEAST_READ_NBYTES
from mpitrain.memory import ScratchPool, address_of

__all__ = ["read_allreduce"]

# What is read at once: with as much of its own a rank stays in its core's cache. It is shared by the peers, but below
# the least there is more to ask for than to copy.
_BLOCK_NBYTES = 512 << 10
_LEAST_BLOCK_NBYTES = 64 << 10
# Results are read to where they stay. Between two reads other operations get their turn.
_RESULT_NBYTES = 8 << 20


def read_allreduce(
    node: Node,
    source: NDArray[Any],
    target: NDArray[Any],
    reduction: Reduction,
    number: int,
    *,
    across: Across | None,
    scratch: ScratchPool,
    gate: Gate | None = None,
) -> Task[bool]:
    """Reduce `source` into `target`, which may be the same, if they are large and all ranks can read those of all.

    Args:
        node: This rank's node.
        source: Of the same length on every rank of all nodes.
        target: As long as that.
        reduction: Same on every rank.
        number: Of the operation; the same on every rank, larger than those before.
        across: How slices are reduced over the nodes; None where there is only one.
        scratch: Lends what is read into.
        gate: Of the array if that has not arrived yet. Nobody can tell by an address how far it is, so it is not read.

    Returns:
        Whether that is done; if not, nothing has changed. The same on all ranks of the node.

    Raises:
        CommError: A rank's memory cannot be read any more.

    Cost: each rank of p on a node reads 2 (p - 1)/p of an array from the others.
    Determinism: reduced in rank order; same bits on all ranks, run after run.
    """
    memory = node.cross_memory
    if memory is None or target.nbytes < LEAST_READ_NBYTES:
        return False
    node.flags.show(number, *((memory.show(source), memory.show(target)) if gate is None else (0, 0)))
    while (shown := node.flags.shown(number)) is None:
        yield False
    if not all(map(all, shown)):
        return False
    stages = Stages(node.flags, number)
    itemsize, size = target.itemsize, target.size
    result_count = _RESULT_NBYTES // itemsize
    # The ranks begin with different peers.
    others = [(node.rank + step) % node.size for step in range(1, node.size)]
    here = shown[node.rank][1]

    def chain(first: int, last: int, piece: int) -> Task[None]:
        begin, end = (first + bound for bound in slice_bounds(last - first, node, node.rank, itemsize, across))
        there = [address + begin * itemsize for address, _ in shown]
        yield from _reduce_read(
            node, source[begin:end], there, target[begin:end], reduction, scratch=scratch, is_final=across is None
        )
        if across is not None:
            yield from finish_across(target[begin:end], reduction, number, piece, across)
        yield from stages.leave(REDUCED, piece)
        yield from stages.left_by_all(REDUCED, piece)
        for owner in others:
            begin, end = (first + bound for bound in slice_bounds(last - first, node, owner, itemsize, across))
            for place in range(begin, end, result_count):
                offset = place * itemsize
                nbytes = (min(place + result_count, end) - place) * itemsize
                memory.read(owner, shown[owner][1] + offset, here + offset, nbytes)
                yield True

    if across is None:
        # Whole slices: what a peer has just written, and still has in its core's cache, takes longest to read.
        yield from chain(0, size, 0)
    else:
        # As on other nodes, whose arrays may be staged.
        count = staged_count(node, target.dtype)
        pieces = range(-(-size // count))
        yield from pipeline((chain(p * count, min((p + 1) * count, size), p) for p in pieces), NUM_STAGED)
    # Nobody may change an array that others still read.
    node.flags.signal(EMPTIED, number)
    yield from wait(node.flags, EMPTIED, number)
    return True


def _reduce_read(
    node: Node,
    own: NDArray[Any],
    addresses: Sequence[int],
    target: NDArray[Any],
    reduction: Reduction,
    *,
    scratch: ScratchPool,
    is_final: bool,
) -> Task[None]:
    """Reduce one slice over the node, block by block, into `target`, which may lie where `own` does."""
    assert node.cross_memory is not None
    itemsize, size = own.itemsize, node.size
    block_count = min(_block_count(node, itemsize), own.size)
    # With more than two parts, only the first may be overwritten by the sum of it and another.
    is_apart = size > 2 and node.rank > 0 and np.may_share_memory(own, target)
    nbytes = block_count * itemsize
    with scratch.borrow((size - 1 + is_apart) * nbytes) as memory:
        found = list(memory.view(own.dtype).reshape(-1, block_count)) if nbytes else []
        apart = found.pop() if is_apart else None
        places = [address_of(part) for part in found]
        peers = [rank for rank in range(size) if rank != node.rank]
        for first in range(0, own.size, block_count or 1):
            last = min(first + block_count, own.size)
            parts = [part[: last - first] for part in found]
            for rank, place in zip(peers, places, strict=True):
                node.cross_memory.read(rank, addresses[rank] + first * itemsize, place, (last - first) * itemsize)
            parts.insert(node.rank, own[first:last])
            total = target[first:last] if apart is None else apart[: last - first]
            if size > 1:
                reduction.combine(parts, total)
            else:
                total[:] = parts[0]
            if is_final:
                reduction.finish(total)
            if apart is not None:
                target[first:last] = total
            yield True


def _block_count(node: Node, itemsize: int) -> int:
    """Return how many elements of each peer are read at once."""
    return max(_LEAST_BLOCK_NBYTES, _BLOCK_NBYTES // max(1, node.size - 1)) // itemsize
