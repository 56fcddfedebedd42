"""Twins of `quantise_blocks` and `dequantise_blocks`: 8 bits a number, and what was lost comes along next time."""

from __future__ import annotations

import numpy as np

from mpitrain.memory.blocks import quiet
from mpitrain.memory.dtypes import DType
from mpitrain.memory.twins.wide import Storage, narrow, widen

__all__ = ["QUANTA", "dequantise_blocks", "quantise_blocks"]

QUANTA = 256
"""Elements that share a scale."""

_LARGEST_CODE = np.float32(127)
_SINGLE = np.dtype(np.float32)


@quiet
def quantise_blocks(elements: Storage, residual: Storage, codes: Storage, scales: Storage, *, dtype: DType) -> None:
    """Quantise `elements + residual` to int8, with one scale for each block of `QUANTA` elements.

    The scale is the largest magnitude of the block, divided by 127; a block with an infinity or NaN has the scale NaN.

    Args:
        elements: Shape `(count,)`; not modified.
        residual: float32, shape `(count,)`; what is lost is left here, nothing where the scale is NaN.
        codes: int8, shape `(count,)`; written.
        scales: float32, shape `(ceil(count / QUANTA),)`; written.
        dtype: Type of the elements: float32, float16 or bfloat16.
    """
    values = widen(elements, dtype, _SINGLE) + residual
    blocks = np.zeros((scales.size, QUANTA), np.float32)
    blocks.reshape(-1)[: values.size] = values
    largest = np.abs(blocks).max(axis=1, initial=0)
    is_sane = np.isfinite(largest)
    scale = largest / _LARGEST_CODE
    quotients = np.where((is_sane & (scale > 0))[:, None], blocks / scale[:, None], np.float32(0))
    rounded = np.clip(np.rint(quotients), -_LARGEST_CODE, _LARGEST_CODE)
    rest = np.where(is_sane[:, None], blocks - rounded * scale[:, None], np.float32(0))
    codes[:] = rounded.reshape(-1)[: values.size]
    residual[:] = rest.reshape(-1)[: values.size]
    scales[:] = np.where(is_sane, scale, np.float32(np.nan))


@quiet
def dequantise_blocks(codes: Storage, scales: Storage, target: Storage, *, dtype: DType, factor: float = 1.0) -> None:
    """Write the sum over all peers of what they quantised, times `factor`.

    Args:
        codes: int8, shape `(num_peers, count)`; added up in the order of the peers, in float32.
        scales: float32, shape `(num_peers, ceil(count / QUANTA))`.
        target: Shape `(count,)`; written, rounded once.
        dtype: Its type: float32, float16 or bfloat16.
        factor: 1 for a sum, 1/n for an average.
    """
    total = np.zeros(target.size, np.float32)
    for peer_codes, peer_scales in zip(codes, scales, strict=True):
        total += peer_codes.astype(np.float32) * np.repeat(peer_scales, QUANTA)[: target.size]
    narrow(total * np.float32(factor), target, dtype)
