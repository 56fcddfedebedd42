"""Floats in the type that they are computed in: float64 where an operand is float64, else float32."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from mpitrain.memory.blocks import quiet
from mpitrain.memory.dtypes import DType
from mpitrain.memory.half import narrow_half, widen_half

__all__ = ["Storage", "narrow", "wide_dtype", "widen"]

Storage: TypeAlias = NDArray[Any]


def wide_dtype(*dtypes: DType) -> np.dtype[Any]:
    """Return the NumPy dtype that elements of these types are computed in together.

    Raises:
        TypeError: One of them is no floating-point type.
    """
    for dtype in dtypes:
        if dtype.kind != "float":
            raise TypeError(f"dtype: must be a floating-point type, got {dtype}; convert to float32")
    return np.dtype(np.float64 if any(dtype.itemsize == 8 for dtype in dtypes) else np.float32)


def widen(data: Storage, dtype: DType, wide: np.dtype[Any]) -> Storage:
    """Return `data`, of a floating-point type, as a new array of dtype `wide`."""
    result = np.empty(data.shape, wide)
    if dtype.itemsize == 2:
        widen_half(data, result, dtype)
    else:
        np.copyto(result, data)
    return result


@quiet
def narrow(values: Storage, data: Storage, dtype: DType) -> None:
    """Round `values` to nearest even into `data`; to 16 bits by way of float32, as torch does it."""
    if dtype.itemsize == 2:
        single = values.astype(np.float32)
        # A NaN whose payload is in the lower half only would become an infinity of bfloat16.
        single[np.isnan(single)] = np.nan
        narrow_half(single, data, dtype)
    else:
        np.copyto(data, values, casting="unsafe")
