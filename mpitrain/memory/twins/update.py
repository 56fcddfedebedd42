"""Twins of `update_momentum` and `update_adam`: one optimizer step on a flat bucket."""

from __future__ import annotations

import numpy as np

from mpitrain.memory.blocks import quiet
from mpitrain.memory.dtypes import DType
from mpitrain.memory.twins.steps import AdamStep, MomentumStep
from mpitrain.memory.twins.wide import Storage, narrow, wide_dtype, widen

__all__ = ["update_adam", "update_momentum"]


@quiet
def update_momentum(
    parameters: Storage,
    gradients: Storage,
    momentum: Storage | None,
    *,
    parameter_dtype: DType,
    gradient_dtype: DType,
    step: MomentumStep,
) -> None:
    """Do one step of SGD with momentum, in place.

    Args:
        parameters: Shape `(count,)`; modified.
        gradients: Shape `(count,)`; not modified.
        momentum: Shape `(count,)`, float64 if one of the types is float64, else float32; modified, and read but in the
            first step. None without momentum.
        parameter_dtype: Type of the parameters, a float.
        gradient_dtype: Type of the gradients, a float.
        step: Everything else.
    """
    wide = wide_dtype(parameter_dtype, gradient_dtype)
    lr, decay, gradient_weight, weight_decay, gradient_scale = (wide.type(number) for number in step.numbers())
    weight = widen(parameters, parameter_dtype, wide)
    slope = widen(gradients, gradient_dtype, wide) * gradient_scale + weight_decay * weight
    direction = slope
    if momentum is not None:
        momentum[:] = slope if step.is_first else decay * momentum + gradient_weight * slope
        direction = slope + decay * momentum if step.nesterov else momentum
    narrow(weight - lr * direction, parameters, parameter_dtype)


@quiet
def update_adam(
    parameters: Storage,
    gradients: Storage,
    mean: Storage,
    square: Storage,
    *,
    parameter_dtype: DType,
    gradient_dtype: DType,
    step: AdamStep,
) -> None:
    """Do one step of Adam or AdamW, in place.

    Args:
        parameters: Shape `(count,)`; modified.
        gradients: Shape `(count,)`; not modified.
        mean: Shape `(count,)`, float64 if one of the types is float64, else float32; modified, zero before the first
            step.
        square: As `mean`.
        parameter_dtype: Type of the parameters, a float.
        gradient_dtype: Type of the gradients, a float.
        step: Everything else.
    """
    wide = wide_dtype(parameter_dtype, gradient_dtype)
    numbers = (wide.type(number) for number in step.numbers())
    kept, added_decay, mean_weight, square_decay, square_weight, step_size, correction, epsilon, scale = numbers
    weight = widen(parameters, parameter_dtype, wide)
    slope = widen(gradients, gradient_dtype, wide) * scale + added_decay * weight
    mean += mean_weight * (slope - mean)
    square[:] = square_decay * square + square_weight * (slope * slope)
    divisor = np.sqrt(square) / correction + epsilon
    narrow(kept * weight - step_size * (mean / divisor), parameters, parameter_dtype)
