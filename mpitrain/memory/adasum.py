"""Arithmetic of Adasum: inner products of two vectors, and their weighted sum.

Computed in float64, whatever the dtype, in blocks that stay in the cache: an inner product of many small products
would otherwise lose what makes the weights.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from mpitrain.memory.blocks import blocks, quiet
from mpitrain.memory.dtypes import DType
from mpitrain.memory.half import narrow_half, widen_half

__all__ = ["add_weighted", "inner_products"]

Storage: TypeAlias = NDArray[Any]

# Short enough for BLAS to compute in the calling thread: its others would take the cores of other ranks.
_BLOCK_COUNT = 1 << 13


@quiet
def inner_products(first: Storage, second: Storage, dtype: DType) -> tuple[float, float, float]:
    """Return the inner products first x second, first x first and second x second.

    Args:
        first: Shape `(count,)`, storage dtype.
        second: Same shape and dtype.
        dtype: Element type of both, a float.
    """
    both = squared = other_squared = 0.0
    scratch = np.empty((2, min(first.size, _BLOCK_COUNT)), np.float64)
    for block in blocks(first.size, _BLOCK_COUNT):
        left, right = _widened(first[block], scratch[0], dtype), _widened(second[block], scratch[1], dtype)
        both += float(np.dot(left, right))
        squared += float(np.dot(left, left))
        other_squared += float(np.dot(right, right))
    return both, squared, other_squared


@quiet
def add_weighted(target: Storage, weight: float, other: Storage, other_weight: float, dtype: DType) -> None:
    """Set `target` to `weight * target + other_weight * other`, rounded once.

    Args:
        target: Shape `(count,)`, storage dtype; holds the result on return.
        weight: Of the target.
        other: Same shape and dtype; not modified.
        other_weight: Of the other one.
        dtype: Element type of both, a float.
    """
    scratch = np.empty((2, min(target.size, _BLOCK_COUNT)), np.float64)
    for block in blocks(target.size, _BLOCK_COUNT):
        part = target[block]
        left, right = scratch[:, : part.size]
        np.multiply(_widened(part, left, dtype), weight, out=left)
        np.multiply(_widened(other[block], right, dtype), other_weight, out=right)
        np.add(left, right, out=left)
        if dtype.itemsize == 2:
            narrow_half(left, part, dtype)
        else:
            np.copyto(part, left, casting="unsafe")


def _widened(part: Storage, scratch: Storage, dtype: DType) -> Storage:
    """Return the elements in float64: in `scratch`, unless they are that already."""
    if dtype.itemsize == 8:
        return part
    wide = scratch[: part.size]
    if dtype.itemsize == 2:
        widen_half(part, wide, dtype)
    else:
        np.copyto(wide, part)
    return wide
