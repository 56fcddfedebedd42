"""Arithmetic on the 16-bit floats, float16 and bfloat16.

Computed in float32 and rounded to nearest even, once per operation. Torch's kernels do so several times
faster than NumPy and are used if the process has loaded torch; NumPy alone gives the same bits.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from mpitrain.memory.blocks import BLOCK_COUNT, apply_in_place, blocks, quiet
from mpitrain.memory.dtypes import DType
from mpitrain.memory.loaded import TorchModule, loaded_torch

__all__ = ["by_number_half", "extreme_half", "narrow_half", "reduce_half", "widen_half"]

Storage: TypeAlias = NDArray[Any]
Tensor: TypeAlias = Any


def reduce_half(accumulator: Storage, operand: Storage, ufunc: np.ufunc, dtype: DType) -> None:
    """Set `accumulator` to its sum or product (`ufunc`) with `operand`, of the same float16 or bfloat16."""
    torch = loaded_torch()
    # torch.from_numpy warns on read-only memory.
    if torch is not None and operand.flags.writeable:
        total = _as_tensor(accumulator, torch, dtype)
        kernel = torch.add if ufunc is np.add else torch.mul
        kernel(total, _as_tensor(operand, torch, dtype), out=total)
    elif dtype.name == "float16":
        # NumPy's own loops compute in float32, too; casting whole blocks is slower.
        apply_in_place(ufunc, accumulator, operand)
    else:
        _reduce_bfloat16(accumulator, operand, ufunc)


@quiet
def _reduce_bfloat16(accumulator: Storage, operand: Storage, ufunc: np.ufunc) -> None:
    first = np.empty(min(accumulator.size, BLOCK_COUNT), np.uint32)
    second = np.empty_like(first)
    for block in blocks(accumulator.size):
        bits = accumulator[block]
        left, right = first[: bits.size], second[: bits.size]
        _widen(bits, left)
        _widen(operand[block], right)
        result = left.view(np.float32)
        ufunc(result, right.view(np.float32), out=result)
        _narrow(left, right, bits)


def by_number_half(data: Storage, ufunc: np.ufunc, number: float, dtype: DType) -> None:
    """Multiply or divide (`ufunc`) float16 or bfloat16 `data` by one number, in place."""
    torch = loaded_torch()
    if torch is not None:
        tensor = _as_tensor(data, torch, dtype)
        kernel = torch.mul if ufunc is np.multiply else torch.div
        kernel(tensor, number, out=tensor)
    else:
        _by_number_blocks(data, ufunc, number, dtype)


@quiet
def _by_number_blocks(data: Storage, ufunc: np.ufunc, number: float, dtype: DType) -> None:
    first = np.empty(min(data.size, BLOCK_COUNT), np.uint32)
    second = np.empty_like(first)
    for block in blocks(data.size):
        part = data[block]
        wide, scratch = first[: part.size], second[: part.size]
        values = wide.view(np.float32)
        if dtype.name == "bfloat16":
            _widen(part, wide)
            ufunc(values, number, out=values)
            _narrow(wide, scratch, part)
        else:
            np.copyto(values, part)
            ufunc(values, number, out=values)
            np.copyto(part, values, casting="unsafe")


def widen_half(data: Storage, wide: Storage, dtype: DType) -> None:
    """Write float16 or bfloat16 `data` to `wide`, of float64."""
    if dtype.name == "bfloat16":
        bits = np.empty(data.size, np.uint32)
        _widen(data, bits)
        np.copyto(wide, bits.view(np.float32))
    else:
        np.copyto(wide, data)


def narrow_half(wide: Storage, data: Storage, dtype: DType) -> None:
    """Round `wide`, of float64, to nearest even into float16 or bfloat16 `data`."""
    if dtype.name == "bfloat16":
        bits = wide.astype(np.float32).view(np.uint32)
        _narrow(bits, np.empty_like(bits), data)
    else:
        np.copyto(data, wide, casting="unsafe")


def _widen(bits: Storage, wide: Storage) -> None:
    """Write bfloat16 `bits` to `wide` as the bits of float32: bfloat16 is its upper half."""
    np.left_shift(bits, 16, out=wide, dtype=np.uint32)


def _narrow(wide: Storage, scratch: Storage, bits: Storage) -> None:
    """Round the float32 bits in `wide` to nearest even and write the upper halves to `bits`.

    Adding half a unit (less one bit for an even result) carries into the upper half exactly when the
    value rounds up, from the largest finite one into infinity, too. A NaN that came from bfloat16
    operands has an empty lower half (hardware keeps payloads, or makes its default), so it is not carried
    into the exponent.
    """
    np.right_shift(wide, 16, out=scratch)
    np.bitwise_and(scratch, 1, out=scratch)
    np.add(scratch, 0x7FFF, out=scratch)
    np.add(wide, scratch, out=wide)
    np.right_shift(wide, 16, out=wide)
    np.copyto(bits, wide, casting="unsafe")


def extreme_half(accumulator: Storage, operand: Storage, ufunc: np.ufunc, dtype: DType) -> None:
    """Min or max of 16-bit floats on their bits.

    Torch's kernels leave the sign of a zero to the position in a vector; here -0 < +0 always, so
    ranks agree. It is also far faster than NumPy's float16 loops.
    """
    infinity = 0x7F80 if dtype.name == "bfloat16" else 0x7C00
    keys = np.empty((2, min(accumulator.size, BLOCK_COUNT)), np.int16)
    scratch = np.empty(keys.shape[1], np.int16)
    for block in blocks(accumulator.size):
        bits = accumulator[block].view(np.int16)
        count = bits.size
        others, mine, theirs, swap = (
            operand[block].view(np.int16),
            keys[0, :count],
            keys[1, :count],
            scratch[:count],
        )
        np.bitwise_and(bits, 0x7FFF, out=mine)
        np.bitwise_and(others, 0x7FFF, out=theirs)
        np.maximum(mine, theirs, out=mine)
        is_nan = mine > infinity
        _as_ordered(bits, swap, mine)
        _as_ordered(others, swap, theirs)
        ufunc(mine, theirs, out=mine)
        _as_ordered(mine, swap, bits)
        bits[is_nan] = infinity | (infinity >> 1)


def _as_ordered(bits: Storage, scratch: Storage, keys: Storage) -> None:
    """Turn sign and magnitude into integers of the same order, or back: flip the rest of negative ones."""
    np.right_shift(bits, 15, out=scratch)
    np.bitwise_and(scratch, 0x7FFF, out=scratch)
    np.bitwise_xor(bits, scratch, out=keys)


def _as_tensor(data: Storage, torch: TorchModule, dtype: DType) -> Tensor:
    tensor = torch.from_numpy(data)
    return tensor if dtype.name == "float16" else tensor.view(torch.bfloat16)
