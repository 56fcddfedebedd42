"""Twin of `reduce_peers`: the arrays of n peers reduced into m arrays."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mpitrain.memory.blocks import quiet
from mpitrain.memory.dtypes import DType
from mpitrain.memory.reduction import ReduceOp, divide_by, reduce_into
from mpitrain.memory.twins.wide import Storage, narrow, widen

__all__ = ["reduce_peers"]

_UFUNCS = {ReduceOp.SUM: np.add, ReduceOp.AVERAGE: np.add, ReduceOp.PRODUCT: np.multiply}


def reduce_peers(
    sources: Sequence[Storage], targets: Sequence[Storage], *, dtype: DType, op: ReduceOp, divisor: int = 1
) -> None:
    """Reduce `sources` element by element, in their order, and write the result to all `targets`.

    The 16-bit floats are accumulated in float32 and rounded once, at the end. Min and max know -0 as less than +0.

    Args:
        sources: At least one, of shape `(count,)` and the storage of `dtype`.
        targets: Of the same shape and type; may be sources.
        dtype: Element type.
        op: Anything but adasum.
        divisor: What the result is divided by at the end, as `divide_by` does.
    """
    if dtype.kind == "float" and dtype.itemsize == 2 and op in _UFUNCS:
        result = _reduce_half(sources, dtype, op, divisor)
    else:
        result = sources[0].copy()
        for source in sources[1:]:
            before = result.copy()
            reduce_into(result, source, op, dtype)
            if op in (ReduceOp.MIN, ReduceOp.MAX) and dtype.kind == "float" and dtype.itemsize > 2:
                _order_zeros(result, before, source, op)
        if divisor != 1:
            divide_by(result, divisor, dtype)
    for target in targets:
        target[:] = result


@quiet
def _reduce_half(sources: Sequence[Storage], dtype: DType, op: ReduceOp, divisor: int) -> Storage:
    wide = np.dtype(np.float32)
    total = widen(sources[0], dtype, wide)
    for source in sources[1:]:
        _UFUNCS[op](total, widen(source, dtype, wide), out=total)
    if divisor != 1:
        np.divide(total, np.float32(divisor), out=total)
    result = np.empty_like(sources[0])
    narrow(total, result, dtype)
    return result


def _order_zeros(result: Storage, left: Storage, right: Storage, op: ReduceOp) -> None:
    """Where both numbers are zero, give the result the sign that makes -0 less than +0."""
    both = (left == 0) & (right == 0)
    negative = np.signbit(left), np.signbit(right)
    is_negative = np.logical_or(*negative) if op is ReduceOp.MIN else np.logical_and(*negative)
    np.copyto(result, np.where(is_negative, -0.0, 0.0), where=both)
