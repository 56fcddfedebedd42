"""Launches `update_momentum` and `update_adam`: one optimizer step on a flat bucket."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mpitrain.memory.device.kernels.loader import Array, address_of, common_head, launch, num_blocks_for
from mpitrain.memory.device.kernels.variants import update_variant
from mpitrain.memory.device.streams import Stream
from mpitrain.memory.dtypes import DType
from mpitrain.memory.twins import AdamStep, MomentumStep, wide_dtype

__all__ = ["update_adam", "update_momentum"]


def update_momentum(
    parameters: Array,
    gradients: Array,
    momentum: Array | None,
    *,
    count: int,
    parameter_dtype: DType,
    gradient_dtype: DType,
    step: MomentumStep,
    stream: Stream | None = None,
) -> None:
    """Do one step of SGD with momentum, in place and in one pass.

    Args:
        parameters: A floating-point type; modified.
        gradients: A floating-point type; not modified.
        momentum: float64 if one of the types is float64, else float32; modified, and read but in the first step.
            None without momentum.
        count: Elements of each array.
        parameter_dtype: Type of the parameters.
        gradient_dtype: Type of the gradients.
        step: Everything else.
        stream: Stream of the current device; CuPy's current one without.

    Raises:
        TypeError: A type that is no floating-point type.
        UnavailableError: The kernel cannot be compiled here.
    """
    dtypes = parameter_dtype, gradient_dtype
    flags = np.int32(step.nesterov), np.int32(step.is_first)
    numbers = *_wide_numbers(dtypes, step.numbers()), *flags
    _launch("update_momentum", dtypes, (parameters, gradients, momentum), count, numbers=numbers, stream=stream)


def update_adam(
    parameters: Array,
    gradients: Array,
    mean: Array,
    square: Array,
    *,
    count: int,
    parameter_dtype: DType,
    gradient_dtype: DType,
    step: AdamStep,
    stream: Stream | None = None,
) -> None:
    """Do one step of Adam or AdamW, in place and in one pass.

    Args:
        parameters: A floating-point type; modified.
        gradients: A floating-point type; not modified.
        mean: float64 if one of the types is float64, else float32; modified, zero before the first step.
        square: As `mean`.
        count: Elements of each array.
        parameter_dtype: Type of the parameters.
        gradient_dtype: Type of the gradients.
        step: Everything else.
        stream: Stream of the current device; CuPy's current one without.

    Raises:
        TypeError: A type that is no floating-point type.
        UnavailableError: The kernel cannot be compiled here.
    """
    dtypes = parameter_dtype, gradient_dtype
    numbers = _wide_numbers(dtypes, step.numbers())
    _launch("update_adam", dtypes, (parameters, gradients, mean, square), count, numbers=numbers, stream=stream)


def _wide_numbers(dtypes: tuple[DType, DType], numbers: Sequence[float]) -> tuple[np.generic, ...]:
    wide = wide_dtype(*dtypes)
    return tuple(wide.type(number) for number in numbers)


def _launch(
    source: str,
    dtypes: tuple[DType, DType],
    arrays: Sequence[Array | None],
    count: int,
    *,
    numbers: Sequence[np.generic],
    stream: Stream | None,
) -> None:
    variant = update_variant(source, *dtypes)
    if count == 0:
        return
    wide = wide_dtype(*dtypes)
    addresses = [0 if array is None else address_of(array) for array in arrays]
    itemsizes = [dtype.itemsize for dtype in dtypes] + [wide.itemsize] * (len(arrays) - 2)
    group_count = 16 // wide.itemsize
    head = common_head(list(zip(addresses, itemsizes, strict=True)), group_count, count)
    num_accesses = count if head == count else -(-count // group_count)
    # Without momentum its address is null, which the kernel asks for, and which is aligned to anything.
    arguments = (*addresses, np.int64(count), np.int64(head), *numbers)
    launch(variant, source, num_blocks_for(num_accesses), arguments, stream)
