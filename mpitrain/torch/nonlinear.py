"""Gradients of the all-reduces that are not linear: minimum, maximum and product.

As all ranks have the result, its gradient is the sum over the ranks. It belongs to the ranks that brought the extreme
value, in equal parts; for a product each rank gets it times what the others brought.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch.autograd.function import once_differentiable

from mpitrain.memory import ReduceOp, flat_view, scale
from mpitrain.torch.gradients import gradient_name, is_differentiable, needs_gradient
from mpitrain.torch.starting import Operation

__all__ = ["carry_nonlinear_gradients"]

Tensor = torch.Tensor

Reduce: TypeAlias = Callable[[Sequence[Tensor], str, ReduceOp], Sequence[Tensor]]
"""All-reduces tensors under a name."""


class _Rule(NamedTuple):
    op: ReduceOp
    prescale: float
    postscale: float
    name: str
    reduce: Reduce


def carry_nonlinear_gradients(
    operation: Operation,
    tensors: Sequence[Tensor],
    run: Callable[[], Sequence[Tensor]],
    reduce: Reduce,
    *,
    op: ReduceOp,
    prescale: float,
    postscale: float,
) -> Sequence[Tensor]:
    """Run an all-reduce so that gradients, but not gradients of these, flow back through it.

    Args:
        operation: What runs.
        tensors: What it is run on.
        run: Returns the results.
        reduce: For the backward pass.
        op: Minimum, maximum or product.
        prescale: Factor before the reduction.
        postscale: Factor after it.

    Returns:
        The results.
    """
    if not needs_gradient(tensors):
        return run()
    rule = _Rule(op, prescale, postscale, gradient_name(operation), reduce)
    return _Nonlinear.apply(run, rule, *tensors)  # type: ignore[no-untyped-call,no-any-return]


class _Nonlinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: Callable[[], Sequence[Tensor]], rule: _Rule, *tensors: Tensor) -> tuple[Tensor, ...]:
        results = run()
        ctx.rule = rule
        ctx.takes = [is_differentiable(tensor) for tensor in tensors]
        ctx.save_for_backward(*filter(is_differentiable, tensors), *filter(is_differentiable, results))
        return tuple(results)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        count = sum(ctx.takes)
        tensors, results = ctx.saved_tensors[:count], ctx.saved_tensors[count:]
        given = [gradient for gradient, takes in zip(gradients, ctx.takes, strict=True) if takes]
        pull_back = _of_product if ctx.rule.op is ReduceOp.PRODUCT else _of_extreme
        pulled = iter(pull_back(ctx.rule, tensors, results, given))
        return (None, None, *(next(pulled) if takes else None for takes in ctx.takes))


def _of_extreme(
    rule: _Rule, tensors: Sequence[Tensor], results: Sequence[Tensor], gradients: Sequence[Tensor]
) -> list[Tensor]:
    # Scaled as the result was, to the bit, so that what won is equal to it.
    brought = [_scaled(_scaled(tensor, rule.prescale), rule.postscale) for tensor in tensors]
    # Counts are exact in float32 for any number of ranks, in 16 bits they are not.
    won = [(mine == result).float() for mine, result in zip(brought, results, strict=True)]
    reduced = rule.reduce([*gradients, *won], rule.name, ReduceOp.SUM)
    totals, counts = reduced[: len(tensors)], reduced[len(tensors) :]
    factor = rule.prescale * rule.postscale
    return [
        (total * factor * (mine / winners.clamp(min=1.0))).to(total.dtype)
        for total, mine, winners in zip(totals, won, counts, strict=True)
    ]


def _of_product(
    rule: _Rule, tensors: Sequence[Tensor], _results: Sequence[Tensor], gradients: Sequence[Tensor]
) -> list[Tensor]:
    # Dividing the product by one's own factor gives that of the others, unless there are zeros: these are counted.
    factors = [_scaled(tensor, rule.prescale) for tensor in tensors]
    is_zero = [factor == 0 for factor in factors]
    zeros = [each.float() for each in is_zero]
    reduced = rule.reduce([*gradients, *zeros], rule.name, ReduceOp.SUM)
    totals, counts = reduced[: len(tensors)], reduced[len(tensors) :]
    nonzero = [torch.where(each, 1.0, factor) for each, factor in zip(is_zero, factors, strict=True)]
    products = rule.reduce(nonzero, f"{rule.name}.product", ReduceOp.PRODUCT)
    pulled = []
    for total, count, product, mine, own_zero in zip(totals, counts, products, nonzero, zeros, strict=True):
        of_others = torch.where(count == own_zero, product / mine, 0.0)
        pulled.append(total * of_others * (rule.prescale * rule.postscale))
    return pulled


def _scaled(tensor: Tensor, factor: float) -> Tensor:
    if factor == 1.0:
        return tensor
    result = tensor.detach().clone(memory_format=torch.contiguous_format)
    view = flat_view(result, writable=True)
    scale(view.data, factor, view.dtype)
    return result
