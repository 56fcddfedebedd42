"""Twin of `select_values`: the large elements with their indices, and all others kept for the next time."""

from __future__ import annotations

import numpy as np

from mpitrain.memory.blocks import quiet
from mpitrain.memory.dtypes import DType
from mpitrain.memory.twins.wide import Storage, narrow, wide_dtype, widen

__all__ = ["select_values"]


@quiet
def select_values(
    elements: Storage, residual: Storage, indices: Storage, values: Storage, *, threshold: float, dtype: DType
) -> int:
    """Select where `|elements + residual| >= threshold`, in the order of the index.

    What is infinite or NaN is selected. If more is selected than there is room for, the first ones are written, and
    the others stay in the residual.

    Args:
        elements: Shape `(count,)`, a floating-point type; not modified.
        residual: Shape `(count,)`, float64 for float64, else float32; what is not sent is left here, and what rounding
            has lost of what is.
        indices: int32, shape `(capacity,)`; written as far as elements are selected.
        values: Shape `(capacity,)`, type `dtype`; as `indices`.
        threshold: At 0 all elements are selected.
        dtype: Type of the elements.

    Returns:
        How many elements are selected; may be more than the capacity.
    """
    wide = wide_dtype(dtype)
    residual += widen(elements, dtype, wide)
    selected = np.flatnonzero(~(np.abs(residual) < wide.type(threshold)))
    sent = selected[: indices.size]
    indices[: sent.size] = sent
    narrow(residual[sent], values[: sent.size], dtype)
    rest = residual[sent] - widen(values[: sent.size], dtype, wide)
    # An overflow was sent; kept, it would spoil every step to come.
    residual[sent] = np.where(np.isfinite(rest), rest, wide.type(0))
    return int(selected.size)
