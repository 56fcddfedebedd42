"""What a reduction in shared memory does with the elements."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpitrain.memory import DType, ReduceOp, divide_by, plain_ufunc, quiet_context, reduce_into

__all__ = ["Reduction"]


class Reduction:
    """What is done to the elements.

    Args:
        dtype: What the arrays hold, in its storage dtype.
        op: How they are combined.
        size: Number of ranks that an average divides by.
    """

    def __init__(self, dtype: DType, op: ReduceOp, size: int) -> None:
        self.dtype = dtype
        self.op = op
        self.size = size
        self._ufunc = plain_ufunc(op, dtype)
        self._quietly = quiet_context().run  # overflow to infinity is a result like any other
        self._averages = op is ReduceOp.AVERAGE

    def combine(self, parts: Sequence[NDArray[Any]], total: NDArray[Any]) -> None:
        """Reduce the parts in order into `total`, which may be the first of them, or either of two."""
        if self._ufunc is not None:
            self._quietly(self._ufunc, parts[0], parts[1], out=total)
            if len(parts) > 2:
                for part in parts[2:]:
                    self._quietly(self._ufunc, total, part, out=total)
            return
        if len(parts) == 2 and np.may_share_memory(total, parts[1]):
            rest = parts[:1]  # every reduction is commutative
        else:
            if not np.may_share_memory(total, parts[0]):
                total[:] = parts[0]
            rest = parts[1:]
        for part in rest:
            reduce_into(total, part, self.op, self.dtype)

    def finish(self, total: NDArray[Any]) -> None:
        """Turn the sum over all ranks into what was asked for."""
        if self._averages:
            divide_by(total, self.size, self.dtype)
