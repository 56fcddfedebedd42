"""Where the numbered chunks of a schedule lie in memory."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

__all__ = ["Layout", "even_counts"]


def even_counts(count: int, parts: int) -> tuple[int, ...]:
    """Cut `count` elements into `parts`; the first `count % parts` get one more than the others."""
    share, extra = divmod(count, parts)
    return tuple(share + (part < extra) for part in range(parts))


class Layout(NamedTuple):
    """Place and length of every chunk.

    Attributes:
        counts: Elements of each chunk.
        offsets: First element of each chunk in its array; -1 where this rank never touches it.
        arrays: For each chunk, which of the operation's arrays it lies in.
    """

    counts: tuple[int, ...]
    offsets: tuple[int, ...]
    arrays: tuple[int, ...]

    @classmethod
    def packed(cls, *arrays: Sequence[int]) -> Layout:
        """Chunks one after another: each argument has the counts of one array's chunks."""
        counts: list[int] = []
        offsets: list[int] = []
        owners: list[int] = []
        for index, array_counts in enumerate(arrays):
            counts += array_counts
            offsets += list(accumulate(array_counts, initial=0))[: len(array_counts)]
            owners += [index] * len(array_counts)
        return cls(tuple(counts), tuple(offsets), tuple(owners))

    @classmethod
    def compact(cls, counts: Sequence[int], touched: Sequence[int]) -> Layout:
        """One array that holds only the `touched` chunks, in ascending order."""
        offsets = [-1] * len(counts)
        offset = 0
        for chunk in sorted(touched):
            offsets[chunk] = offset
            offset += counts[chunk]
        return cls(tuple(counts), tuple(offsets), (0,) * len(counts))

    def span(self, start: int, stop: int) -> tuple[int, int, int]:
        """Return (array, offset, count) of chunks `start` to `stop`, which lie side by side."""
        count = sum(self.counts[start:stop])
        assert self.offsets[start] >= 0
        assert self.arrays[start] == self.arrays[stop - 1]
        return self.arrays[start], self.offsets[start], count
