"""All-reduce of ordinary arrays by ranks of a node that read each other's memory.

Where the kernel allows that (see `memory.cross_memory`), each rank reads its slice of the arrays of all others and
reduces it, then reads the slices that the others have reduced: every byte is copied once, by who needs it. Elsewhere,
where they are small, or where one of them cannot be read, arrays pass through staging memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from numpy.typing import NDArray

from mpitrain.collectives.direct import (
    EMPTIED,
    NUM_STAGED,
    REDUCED,
    Across,
    Stages,
    finish_across,
    keeping,
    pipeline,
    slice_bounds,
    staged_count,
    wait,
)
from mpitrain.collectives.executor import Task
from mpitrain.collectives.gate import Gate
from mpitrain.collectives.node import Node, block_nbytes
from mpitrain.collectives.reduction import Reduction
from mpitrain.collectives.selection import LEAST_READ_NBYTES
from mpitrain.memory import CrossMemory, address_of

__all__ = ["Reading", "addresses_of", "read_allreduce"]

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
    addresses = (0, 0) if gate is not None else addresses_of(source, target)
    node.flags.show(number, *addresses)
    while (shown := node.flags.shown(number)) is None:
        yield False
    if not all(map(all, shown)):
        return False
    stages = Stages(node.flags, number)
    reading = Reading(node, source, target, shown, reduction, across=across)

    def chain(first: int, last: int, piece: int) -> Task[None]:
        yield from reading.reduce(first, last)
        if across is not None:
            begin, end = reading.bounds(first, last, node.rank)
            yield from finish_across(target[begin:end], reduction, number, piece, across)
        yield from stages.leave(REDUCED, piece)
        yield from stages.left_by_all(REDUCED, piece)
        yield from reading.collect(first, last)

    if across is None:
        # Whole slices: what a peer has just written, and still has in its core's cache, takes longest to read.
        yield from chain(0, target.size, 0)
    else:
        # As on other nodes, whose arrays may be staged.
        size, count = target.size, staged_count(node, target.dtype)
        pieces = range(-(-size // count))
        yield from pipeline((chain(p * count, min((p + 1) * count, size), p) for p in pieces), NUM_STAGED)
    with keeping(node.flags, EMPTIED, number):
        yield from wait(node.flags, EMPTIED, number)
    return True


def addresses_of(source: NDArray[Any], target: NDArray[Any]) -> tuple[int, int]:
    """Return where others can read two arrays, which may be one; 0 where they cannot."""
    there = CrossMemory.readable_address(target)
    return there if source is target else CrossMemory.readable_address(source), there


class Reading:
    """What a rank reads in one all-reduce.

    Args:
        node: Its node.
        source: See `read_allreduce`; likewise the others.
        target: See there.
        shown: Addresses of sources and targets, by rank on the node.
        reduction: See there.
        across: See there.
    """

    def __init__(
        self,
        node: Node,
        source: NDArray[Any],
        target: NDArray[Any],
        shown: Sequence[tuple[int, int]],
        reduction: Reduction,
        *,
        across: Across | None,
    ) -> None:
        assert node.cross_memory is not None
        self._node = node
        self._read = node.cross_memory.read
        self._source = source
        self._target = target
        self._shown = shown
        self._reduction = reduction
        self._across = across

    def bounds(self, first: int, last: int, owner: int) -> tuple[int, int]:
        """Return begin and end of a rank's slice of some elements."""
        begin, end = slice_bounds(last - first, self._node, owner, self._target.itemsize, self._across)
        return first + begin, first + end

    def reduce(self, first: int, last: int) -> Iterator[bool]:
        """Reduce this rank's slice of some elements over the node, block by block."""
        node, itemsize, reduction = self._node, self._target.itemsize, self._reduction
        begin, end = self.bounds(first, last, node.rank)
        count = block_nbytes(node.size) // itemsize
        peers = [(rank, address) for rank, (address, _) in enumerate(self._shown) if rank != node.rank]
        # With more than two parts, only the first may be overwritten by the sum of it and another.
        is_apart = len(peers) > 1 and node.rank > 0 and self._source is self._target
        with node.blocks() as memory:
            found = list(memory.view(self._target.dtype).reshape(node.size, count))
            apart = found.pop() if is_apart else None
            places = [address_of(part) for part in found]
            for at in range(begin, end, count):
                length = min(count, end - at)
                parts = [part[:length] for part in found[: len(peers)]]
                for (rank, address), place in zip(peers, places, strict=False):
                    self._read(rank, address + at * itemsize, place, length * itemsize)
                parts.insert(node.rank, self._source[at : at + length])
                target = self._target[at : at + length]
                total = target if apart is None else apart[:length]
                if peers:
                    reduction.combine(parts, total)
                elif self._source is not self._target:
                    total[:] = parts[0]
                if self._across is None:
                    reduction.finish(total)
                if apart is not None:
                    target[:] = total
                yield True

    def collect(self, first: int, last: int) -> Iterator[bool]:
        """Read what the others have reduced of some elements."""
        node, itemsize = self._node, self._target.itemsize
        here = self._shown[node.rank][1]
        for step in range(1, node.size):  # the ranks begin with different peers
            owner = (node.rank + step) % node.size
            begin, end = (bound * itemsize for bound in self.bounds(first, last, owner))
            there = self._shown[owner][1]
            for at in range(begin, end, _RESULT_NBYTES):
                self._read(owner, there + at, here + at, min(_RESULT_NBYTES, end - at))
                yield True
