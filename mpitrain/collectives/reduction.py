"""What a reduction in shared memory does with the elements."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
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

    def of_parts(self, parts: Sequence[NDArray[Any]]) -> Callable[..., NDArray[Any]]:
        """Return a function of `total`, as `combine` has it, that combines these parts and finishes.

        Without an argument it makes `total`. Either way it returns it.
        """
        ufunc = self._ufunc
        # In one call of C; to these two the output must be named.
        names_output = ufunc in (np.maximum, np.minimum)
        if ufunc is not None and not names_output and not self._averages and len(parts) == 2 and parts[0].ndim:
            return functools.partial(self._quietly, ufunc, *parts)

        flat_parts = [part.reshape(-1) for part in parts]

        def reduce(total: NDArray[Any] | None = None) -> NDArray[Any]:
            total = np.empty_like(parts[0]) if total is None else total
            flat = total.reshape(-1)
            self.combine(flat_parts, flat)
            self.finish(flat)
            return total

        return reduce

    def finish(self, total: NDArray[Any]) -> None:
        """Turn the sum over all ranks into what was asked for."""
        if self._averages:
            divide_by(total, self.size, self.dtype)
