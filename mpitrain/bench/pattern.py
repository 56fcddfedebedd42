"""What ranks bring to a collective that is checked, and what they must get.

Values depend on the rank and on the index, and are small integers of which every dtype holds all sums exactly, in
whatever order they are added. They repeat with a period that has no factor in common with the sizes of chunks, so that
a chunk in the wrong place shows; so it takes no more memory than one period to know what is right.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpitrain.memory import DType, ReduceOp, divide_by

__all__ = ["Pattern", "count_wrong", "fill"]

_PRIME = 31
# Values are 0 to 3. So many of them sum up to less than 128, which int8 and bfloat16 hold.
_MOST_SUMMED = 40
_PIECE_COUNT = 1 << 20


class Pattern:
    """What each of `size` ranks brings, one period of it, in the storage dtype.

    Args:
        dtype: Of the elements.
        op: How they will be reduced; SUM where they are only moved.
        size: Number of ranks.
    """

    def __init__(self, dtype: DType, op: ReduceOp, size: int) -> None:
        self.dtype = dtype
        self.op = op
        self.size = size
        # Of very many ranks only every so many-th has something else than 0 at an index.
        self._stride = math.ceil(size / _MOST_SUMMED) | 1

    def brought(self, rank: int) -> NDArray[Any]:
        """Return what a rank brings; `rank` may be any number, where there are more parts than ranks."""
        return self._stored(self._values(rank))

    def reduced(self) -> NDArray[Any]:
        """Return what all ranks bring, reduced."""
        everybodys = np.stack([self._values(rank) for rank in range(self.size)])
        if self.dtype.kind == "bool":
            is_or = self.op in (ReduceOp.SUM, ReduceOp.MAX)
            return self._stored(everybodys.max(axis=0) if is_or else everybodys.min(axis=0))
        ufuncs = {ReduceOp.MIN: np.minimum, ReduceOp.MAX: np.maximum, ReduceOp.PRODUCT: np.multiply}
        total = self._stored(ufuncs.get(self.op, np.add).reduce(everybodys, axis=0))
        if self.op is ReduceOp.AVERAGE:
            divide_by(total, self.size, self.dtype)
        return total

    def _values(self, rank: int) -> NDArray[Any]:
        if self.op is ReduceOp.PRODUCT:
            # At most one 2 at each index.
            period = max(_PRIME, self.size | 1)
            doubled = (np.arange(period) + rank) % period == 0
            if self.dtype.kind == "bool":
                return np.asarray(~doubled, np.int64)
            return np.where(doubled, 2, 1)
        index = np.arange(_PRIME * self._stride)
        values = np.where((index + rank) % self._stride == 0, (index + 5 * rank) % _PRIME % 4, 0)
        if self.dtype.kind == "bool":
            return np.asarray(values == 3, np.int64)
        return values * (1 + 2j) if self.dtype.kind == "complex" else values

    def _stored(self, values: NDArray[Any]) -> NDArray[Any]:
        if self.dtype.name == "bfloat16":
            # Of a small integer as float32 the upper half has all digits.
            return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
        return values.astype(self.dtype.storage)


def fill(data: NDArray[Any], period: NDArray[Any]) -> None:
    """Write a pattern over a flat array, from its first index on."""
    piece = _piece(period)
    for begin in range(0, data.size, piece.size):
        part = data[begin : begin + piece.size]
        part[:] = piece[: part.size]


def count_wrong(data: NDArray[Any], period: NDArray[Any], first: int = 0) -> int:
    """Return how many elements of a flat array are not those of the pattern, of which it begins with index `first`."""
    piece = _piece(np.roll(period, -first))
    wrong = 0
    for begin in range(0, data.size, piece.size):
        part = data[begin : begin + piece.size]
        wrong += int(np.count_nonzero(part != piece[: part.size]))
    return wrong


def _piece(period: NDArray[Any]) -> NDArray[Any]:
    return np.tile(period, max(1, _PIECE_COUNT // period.size))
