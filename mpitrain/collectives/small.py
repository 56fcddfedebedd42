"""All-reduce of small arrays within one node: they are brought to the meeting that checks what all ranks mean.

Each rank leaves its array where the others see it, and when all have come reduces on its own. Of larger arrays each
rank reduces one slice, and takes the others from those who reduced them.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import Any

from numpy.typing import NDArray

from mpitrain.collectives.executor import Task
from mpitrain.collectives.layout import even_counts
from mpitrain.collectives.meeting import Meeting
from mpitrain.collectives.reduction import Reduction

__all__ = ["MOST_READ_NBYTES", "SmallAllreduce"]

MOST_READ_NBYTES = 64 << 10
"""Bytes of others up to which a rank reduces the whole array itself: beyond, a second exchange costs less."""


class SmallAllreduce:
    """All-reduces of one dtype, count and op; any number of them, one after the other.

    Args:
        meeting: Of the ranks of the node, which are all ranks.
        reduction: Same on every rank.
        count: Elements of the array, which fit into a slot.

    Cost: p - 1 arrays read and one written in one exchange; beyond 64 KiB a p-th of that and 2(p-1)/p arrays copied
        in two exchanges, where p is the number of ranks.
    Determinism: reduced in rank order; same bits on all ranks, run after run.
    """

    def __init__(self, meeting: Meeting, reduction: Reduction, count: int) -> None:
        self._meeting = meeting
        self._reduction = reduction
        self._parts = meeting.parts(reduction.dtype.storage, count)
        self._own = [parts[meeting.rank] for parts in self._parts]
        size, rank = reduction.size, meeting.rank
        self.nbytes = count * reduction.dtype.itemsize
        self.is_whole = self.nbytes * (size - 1) <= MOST_READ_NBYTES
        """Whether every rank reduces the whole array."""
        ends = list(accumulate(even_counts(count, size)))
        slices = [slice(begin, end) for begin, end in zip([0, *ends], ends, strict=False)]
        self._mine = slices[rank]
        self._others = [(owner, part) for owner, part in enumerate(slices) if owner != rank]

    def bring(self, data: NDArray[Any]) -> None:
        """Leave what the others need of `data`, before this rank comes to the meeting."""
        own = self._own[self._meeting.next_slot]
        if self.is_whole:
            own[...] = data
        else:
            for _, part in self._others:
                own[part] = data[part]

    def own(self, shape: tuple[int, ...]) -> list[NDArray[Any]]:
        """Return, for each slot, where this rank leaves its data, in a shape of as many elements."""
        return [own.reshape(shape) for own in self._own]

    def reducers(self, shape: tuple[int, ...]) -> list[Callable[..., NDArray[Any]]]:
        """Return, for each slot, a function that reduces what all have brought, where every rank reduces the whole.

        See `Reduction.of_parts`; arrays have that shape.
        """
        return [self._reduction.of_parts([part.reshape(shape) for part in parts]) for parts in self._parts]

    def take(self, data: NDArray[Any], result: NDArray[Any]) -> Task[None]:
        """Return the task that reduces what all have brought, once all have come, into `result`; it may be `data`."""
        if self.is_whole:
            self._reduction.combine(self._parts[self._meeting.slot], result)
            self._reduction.finish(result)
            return
        meeting, reduction, mine = self._meeting, self._reduction, self._mine
        memory = self._parts[meeting.slot]
        # Nobody needs this rank's own slice of what it brought, so that is where its result goes.
        total = memory[meeting.rank][mine]
        reduction.combine(
            [data[mine] if owner == meeting.rank else part[mine] for owner, part in enumerate(memory)], total
        )
        reduction.finish(total)
        meeting.end()
        result[mine] = total
        while not meeting.has_ended():
            yield False
        for owner, part in self._others:
            result[part] = memory[owner][part]
