"""Twins of `pack_segments` and `unpack_segments`: many tensors and one flat bucket."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mpitrain.memory.blocks import quiet
from mpitrain.memory.dtypes import DType
from mpitrain.memory.twins.wide import Storage, narrow, wide_dtype, widen

__all__ = ["pack_segments", "unpack_segments"]


def pack_segments(
    tensors: Sequence[Storage],
    bucket: Storage,
    offsets: Sequence[int],
    *,
    tensor_dtype: DType,
    bucket_dtype: DType,
    scale: float = 1.0,
) -> None:
    """Copy tensors, scaled and cast, to their places in a bucket.

    Computed in float64 if one of the types is float64, else in float32, and rounded once.

    Args:
        tensors: Each of shape `(count,)`; not modified.
        bucket: Flat; modified.
        offsets: Where each tensor begins in the bucket, in elements.
        tensor_dtype: Element type of the tensors.
        bucket_dtype: Element type of the bucket.
        scale: Factor.

    Raises:
        TypeError: A type that is no floating-point type.
    """
    for tensor, offset in zip(tensors, offsets, strict=True):
        _copy(tensor, tensor_dtype, bucket[offset : offset + tensor.size], bucket_dtype, scale)


def unpack_segments(
    tensors: Sequence[Storage],
    bucket: Storage,
    offsets: Sequence[int],
    *,
    tensor_dtype: DType,
    bucket_dtype: DType,
    scale: float = 1.0,
) -> None:
    """Copy the contents of a bucket, scaled and cast, to tensors; with the arguments of `pack_segments`."""
    for tensor, offset in zip(tensors, offsets, strict=True):
        _copy(bucket[offset : offset + tensor.size], bucket_dtype, tensor, tensor_dtype, scale)


@quiet
def _copy(source: Storage, source_dtype: DType, target: Storage, target_dtype: DType, scale: float) -> None:
    wide = wide_dtype(source_dtype, target_dtype)
    values = widen(source, source_dtype, wide)
    np.multiply(values, wide.type(scale), out=values)
    narrow(values, target, target_dtype)
