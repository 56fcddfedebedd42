"""Elementwise reduction of host arrays: what a collective does with what it has received.

Works on *storage* arrays (`FlatArray.data`), in place, and cuts whatever needs a temporary into
blocks that stay in the L2 cache. The 16-bit floats have a module of their own, `half`.
"""

from __future__ import annotations

import math
from enum import IntEnum
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from mpitrain.memory.blocks import BLOCK_COUNT, apply_in_place, blocks, quiet
from mpitrain.memory.dtypes import DType
from mpitrain.memory.half import by_number_half, extreme_half, reduce_half

__all__ = ["ReduceOp", "check_op", "divide_by", "fill_neutral", "parse_op", "plain_ufunc", "reduce_into", "scale"]

Storage: TypeAlias = NDArray[Any]


class ReduceOp(IntEnum):
    """What a reduction does, with Horovod's numbers."""

    AVERAGE = 0
    SUM = 1
    ADASUM = 2
    MIN = 3
    MAX = 4
    PRODUCT = 5


# Powers of two up to here have an exact inverse in every type that floats are divided in.
_LARGEST_INVERTED = 1 << 64

_ARITHMETIC: dict[ReduceOp, np.ufunc] = {
    ReduceOp.AVERAGE: np.add,
    ReduceOp.SUM: np.add,
    ReduceOp.PRODUCT: np.multiply,
}
_ORDERED: dict[ReduceOp, np.ufunc] = {**_ARITHMETIC, ReduceOp.MIN: np.minimum, ReduceOp.MAX: np.maximum}
_UFUNCS: dict[str, dict[ReduceOp, np.ufunc]] = {
    "bool": {
        ReduceOp.SUM: np.logical_or,
        ReduceOp.PRODUCT: np.logical_and,
        ReduceOp.MIN: np.logical_and,
        ReduceOp.MAX: np.logical_or,
    },
    "int": _ORDERED,
    "uint": _ORDERED,
    "float": _ORDERED,
    "complex": _ARITHMETIC,
}
_OPS: dict[str, ReduceOp] = {op.name.lower(): op for op in ReduceOp}


def parse_op(op: str | int | ReduceOp) -> ReduceOp:
    """Return the operation that a caller names, by word (`"sum"`) or by Horovod's number.

    Raises:
        ValueError: No such operation; the message lists all.
    """
    if isinstance(op, ReduceOp):
        return op
    found = _OPS.get(op) if isinstance(op, str) else None
    if isinstance(op, int) and not isinstance(op, bool) and op in ReduceOp._value2member_map_:
        found = ReduceOp(op)
    if found is None:
        known = ", ".join(f"{name} ({known_op.value})" for name, known_op in _OPS.items())
        raise ValueError(f"op: unknown reduction, got {op!r}; use one of {known}")
    return found


def check_op(op: ReduceOp, dtype: DType) -> None:
    """Refuse a reduction that has no meaning for an element type.

    Raises:
        TypeError: Average of bool, min or max of complex, adasum of anything but floats.
    """
    if op is ReduceOp.ADASUM:
        if dtype.kind != "float":
            raise TypeError(f"op: adasum needs a floating-point dtype, got {dtype}; use sum or average")
    elif op not in _UFUNCS[dtype.kind]:
        remedy = "convert to a floating-point dtype" if dtype.kind == "bool" else "reduce real and imaginary parts"
        raise TypeError(f"op: {op.name.lower()} is not defined for this dtype, got {dtype}; {remedy}")


def plain_ufunc(op: ReduceOp, dtype: DType) -> np.ufunc | None:
    """Return the ufunc that does all that `reduce_into` does; None for 16-bit floats, which are reduced in float32."""
    return None if dtype.kind == "float" and dtype.itemsize == 2 else _UFUNCS[dtype.kind].get(op)


def reduce_into(accumulator: Storage, operand: Storage, op: ReduceOp, dtype: DType) -> None:
    """Set `accumulator` to `accumulator (op) operand`, element by element.

    Average adds: dividing by the number of ranks is `divide_by`, once, at the end. Integers wrap;
    sum and max of bool are "or", product and min are "and"; min and max propagate NaN. Which zero is
    the smaller of -0 and +0 is not defined for float32 and float64.

    Args:
        accumulator: Shape `(count,)`, storage dtype; holds the result on return.
        operand: Same shape and dtype; not modified.
        op: Anything but adasum, which is not elementwise.
        dtype: Element type of both.

    Raises:
        TypeError: The operation has no meaning for the type, or the arrays are not of its storage dtype.
        ValueError: The shapes differ, or the operation is not elementwise.
    """
    ufunc = _UFUNCS[dtype.kind].get(op)
    if ufunc is None:
        check_op(op, dtype)
        raise ValueError(f"op: must be elementwise, got {op.name.lower()}; combine whole vectors instead")
    if accumulator.shape != operand.shape:
        raise ValueError(
            f"operand: must have the shape of the accumulator {accumulator.shape}, got {operand.shape}; "
            f"pass parts of equal count"
        )
    _check_storage("accumulator", accumulator, dtype)
    _check_storage("operand", operand, dtype)
    if dtype.kind in ("bool", "int", "uint"):
        ufunc(accumulator, operand, out=accumulator)
    elif dtype.itemsize > 2:
        apply_in_place(ufunc, accumulator, operand)
    elif op in (ReduceOp.MIN, ReduceOp.MAX):
        extreme_half(accumulator, operand, ufunc, dtype)
    else:
        reduce_half(accumulator, operand, ufunc, dtype)


def fill_neutral(data: Storage, op: ReduceOp, dtype: DType) -> None:
    """Fill `data` with what changes no result: reduced with any value, it gives that value.

    Args:
        data: Shape `(count,)`, storage dtype; overwritten.
        op: Zero for sum, average and adasum (which count it all the same), one for product, the largest value for
            min and the smallest for max.
        dtype: Element type of `data`.

    Raises:
        TypeError: The operation has no meaning for the type, or an array that is not of the storage dtype.
    """
    check_op(op, dtype)
    _check_storage("data", data, dtype)
    value: float = {ReduceOp.PRODUCT: 1, ReduceOp.MIN: math.inf, ReduceOp.MAX: -math.inf}.get(op, 0)
    if dtype.kind in ("int", "uint") and math.isinf(value):
        limits = np.iinfo(data.dtype)
        data.fill(limits.max if value > 0 else limits.min)
    elif dtype.name == "bfloat16":
        # The upper half of the same value in float32.
        data.fill(int(np.float32(value).view(np.uint32)) >> 16)
    else:
        data.fill(value > 0 if dtype.kind == "bool" else value)


def scale(data: Storage, factor: float, dtype: DType) -> None:
    """Multiply `data` by `factor` in place.

    Floats and complex numbers are multiplied in their own precision (the 16-bit ones in float32,
    then rounded), integers in float64, then truncated toward zero; what does not fit saturates.

    Args:
        data: Shape `(count,)`, storage dtype; modified.
        factor: Finite for integers.
        dtype: Element type of `data`; not bool.

    Raises:
        TypeError: Bool, or an array that is not of the storage dtype.
        ValueError: A factor that is not finite, for integers.
    """
    _check_storage("data", data, dtype)
    factor = float(factor)
    if dtype.kind == "bool":
        raise TypeError(f"data: cannot be scaled, got {dtype}; convert to a number dtype")
    if dtype.kind in ("int", "uint"):
        if not math.isfinite(factor):
            raise ValueError(f"factor: must be finite for {dtype}, got {factor}; convert to a floating-point dtype")
        if factor != 1.0:
            _scale_integers(data, factor)
    elif factor != 1.0:
        _by_number(data, np.multiply, factor, dtype)


def divide_by(data: Storage, divisor: int, dtype: DType) -> None:
    """Divide `data` by `divisor` in place: the last step of an average.

    Floats are divided in their own precision (the 16-bit ones in float32, then rounded). Integers are
    divided exactly and truncated toward zero, as in C.

    Args:
        data: Shape `(count,)`, storage dtype; modified.
        divisor: At least 1.
        dtype: Element type of `data`; not bool.

    Raises:
        TypeError: Bool, or an array that is not of the storage dtype.
        ValueError: A divisor below 1.
    """
    _check_storage("data", data, dtype)
    if divisor < 1:
        raise ValueError(f"divisor: must be at least 1, got {divisor}; pass the number of ranks")
    if dtype.kind == "bool":
        raise TypeError(f"data: cannot be divided, got {dtype}; convert to a number dtype")
    if divisor == 1:
        return
    if dtype.kind in ("int", "uint"):
        _divide_integers(data, int(divisor))
    elif divisor & (divisor - 1) == 0 and divisor <= _LARGEST_INVERTED:
        # The same quotients, rounded in the same way, in less time.
        _by_number(data, np.multiply, 1.0 / divisor, dtype)
    else:
        _by_number(data, np.true_divide, float(divisor), dtype)


def _by_number(data: Storage, ufunc: np.ufunc, number: float, dtype: DType) -> None:
    if dtype.itemsize == 2:
        by_number_half(data, ufunc, number, dtype)
    elif dtype.kind == "complex":
        # As pairs of reals: a complex product would turn infinities into NaN, and is slower.
        apply_in_place(ufunc, data.view(f"f{dtype.itemsize // 2}"), number)
    else:
        apply_in_place(ufunc, data, number)


def _scale_integers(data: Storage, factor: float) -> None:
    limits = np.iinfo(data.dtype)
    # The largest float64 that fits: float(2**63 - 1) is 2**63 and does not.
    largest = float(limits.max)
    if int(largest) > limits.max:
        largest = math.nextafter(largest, 0.0)
    _scale_integerblocks(data, factor, float(limits.min), largest)


@quiet
def _scale_integerblocks(data: Storage, factor: float, smallest: float, largest: float) -> None:
    # NumPy converts in a buffer of its own, and float64 takes twice the room.
    block_count = BLOCK_COUNT // 2
    scratch = np.empty(min(data.size, block_count), np.float64)
    for block in blocks(data.size, block_count):
        part = data[block]
        values = scratch[: part.size]
        np.multiply(part, factor, out=values, dtype=np.float64)
        np.clip(values, smallest, largest, out=values)
        np.copyto(part, values, casting="unsafe")


def _divide_integers(data: Storage, divisor: int) -> None:
    unsigned = data.view(f"u{data.itemsize}")
    if divisor > np.iinfo(unsigned.dtype).max:
        data.fill(0)
    elif data.dtype.kind == "u":
        np.floor_divide(data, divisor, out=data)
    else:
        # Floor division of magnitudes is truncation. The magnitude of the most negative number fits unsigned.
        for block in blocks(data.size):
            part, magnitude = data[block], unsigned[block]
            is_negative = part < 0
            np.absolute(part, out=part)
            np.floor_divide(magnitude, divisor, out=magnitude)
            np.negative(part, out=part, where=is_negative)


def _check_storage(name: str, data: Storage, dtype: DType) -> None:
    if data.dtype != dtype.storage:
        raise TypeError(f"{name}: must be stored as {dtype.storage}, got {data.dtype}; pass the data of a flat view")
