"""Launches `quantise_blocks` and `dequantise_blocks`: 8 bits a number, and what was lost comes along next time."""

from __future__ import annotations

import numpy as np

from mpitrain.memory.device.kernels.loader import Array, address_of, launch, num_blocks_for
from mpitrain.memory.device.kernels.variants import dequantise_variant, quantise_variant
from mpitrain.memory.device.streams import Stream
from mpitrain.memory.dtypes import DType
from mpitrain.memory.twins import QUANTA

__all__ = ["dequantise_blocks", "quantise_blocks"]

_WARP = 32
# As in dequantise_blocks.cu.
_CODES_PER_GROUP = 8


def quantise_blocks(
    elements: Array,
    residual: Array,
    codes: Array,
    scales: Array,
    *,
    count: int,
    dtype: DType,
    stream: Stream | None = None,
) -> None:
    """Quantise `elements + residual` to int8, with one scale for each `QUANTA` elements.

    Args:
        elements: float32, float16 or bfloat16; not modified.
        residual: float32; what is lost is left here.
        codes: int8; written.
        scales: float32, `ceil(count / QUANTA)` of them; written.
        count: Elements.
        dtype: Type of the elements.
        stream: Stream of the current device; CuPy's current one without.

    Raises:
        TypeError: Another type.
        UnavailableError: The kernel cannot be compiled here.
    """
    variant = quantise_variant(dtype)
    if count == 0:
        return
    arrays = [address_of(array) for array in (elements, residual, codes, scales)]
    num_blocks = num_blocks_for(-(-count // QUANTA) * _WARP)
    launch(variant, "quantise_blocks", num_blocks, (*arrays, np.int64(count)), stream)


def dequantise_blocks(
    codes: Array,
    scales: Array,
    target: Array,
    *,
    count: int,
    dtype: DType,
    num_peers: int = 1,
    codes_stride: int = 0,
    scales_stride: int = 0,
    factor: float = 1.0,
    stream: Stream | None = None,
) -> None:
    """Write the sum over all peers of what they quantised, times `factor`, in float32 and in the order of the peers.

    Args:
        codes: int8, of peer 0; not modified.
        scales: float32, of peer 0; not modified.
        target: float32, float16 or bfloat16; written.
        count: Elements.
        dtype: Type of the target.
        num_peers: At least 1.
        codes_stride: Elements from the codes of a peer to those of the next.
        scales_stride: Elements from the scales of a peer to those of the next.
        factor: 1 for a sum, 1/n for an average.
        stream: Stream of the current device; CuPy's current one without.

    Raises:
        TypeError: Another type.
        ValueError: No peer.
        UnavailableError: The kernel cannot be compiled here.
    """
    variant = dequantise_variant(dtype)
    if num_peers < 1:
        raise ValueError(f"num_peers: must be at least 1, got {num_peers}; pass the number of ranks")
    if count == 0:
        return
    codes, target = address_of(codes), address_of(target)
    misplaced = (
        codes % _CODES_PER_GROUP,
        codes_stride % _CODES_PER_GROUP if num_peers > 1 else 0,
        target % 16,
    )
    head = count if any(misplaced) else 0
    num_accesses = count if head else -(-count // _CODES_PER_GROUP)
    arguments = (
        codes,
        np.int64(codes_stride),
        address_of(scales),
        np.int64(scales_stride),
        np.int32(num_peers),
        target,
        np.int64(count),
        np.int64(head),
        np.float32(factor),
    )
    launch(variant, "dequantise_blocks", num_blocks_for(num_accesses), arguments, stream)
