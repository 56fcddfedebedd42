"""Lets gradients flow back through operations: the backward pass of one is another one.

The rules are Horovod's; each function states its own. One backward pass runs operations in the reverse order of the
forward pass, on every rank. Each is named after its operation of the forward pass, so that the passes of several
threads, in any order, match all the same.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch

from mpitrain.negotiation import Negotiator
from mpitrain.torch.starting import Operation

__all__ = ["PullBack", "carry_gradients", "gradient_name", "is_differentiable", "needs_gradient"]

Tensor = torch.Tensor

PullBack: TypeAlias = Callable[[list[Tensor], str], Sequence[Tensor]]
"""From the gradients of an operation's results, and a name for what it takes, to those of its tensors.

Only tensors of differentiable dtypes have gradients, here and there.
"""

# A name may be used again before the backward pass: each use has a number of its own.
_uses: weakref.WeakKeyDictionary[Negotiator, Counter[str]] = weakref.WeakKeyDictionary()


def needs_gradient(tensors: Sequence[object]) -> bool:
    """Whether autograd records what is done with the tensors now."""
    # What is no tensor is refused where the operation starts.
    return torch.is_grad_enabled() and any(isinstance(each, Tensor) and each.requires_grad for each in tensors)


def is_differentiable(tensor: Tensor) -> bool:
    """Whether tensors of this dtype have gradients."""
    return tensor.is_floating_point() or tensor.is_complex()


def gradient_name(operation: Operation) -> str:
    """Return the name of what the backward pass of an operation starts; same on every rank."""
    if not operation.is_named:
        return f"{operation.name}.gradient"
    uses = _uses.setdefault(operation.negotiator, Counter())
    uses[operation.name] += 1
    return f"{operation.name}.gradient.{uses[operation.name]}"


def carry_gradients(
    operation: Operation, tensors: Sequence[Tensor], run: Callable[[], tuple[Sequence[Tensor], PullBack]]
) -> Sequence[Tensor]:
    """Run an operation that is linear in its tensors, so that gradients flow back through it.

    Args:
        operation: What runs.
        tensors: What it is run on.
        run: Returns the results and how gradients are pulled back; these may be pulled back through that again.

    Returns:
        The results.
    """
    if not needs_gradient(tensors):
        return run()[0]
    return _Linear.apply(run, gradient_name(operation), *tensors)  # type: ignore[no-untyped-call,no-any-return]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, run: Callable[[], tuple[Sequence[Tensor], PullBack]], name: str, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        results, ctx.pull_back = run()
        ctx.name = name
        ctx.takes = [is_differentiable(tensor) for tensor in tensors]
        ctx.gives = [is_differentiable(result) for result in results]
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        given = [gradient for gradient, has_one in zip(gradients, ctx.gives, strict=True) if has_one]
        pulled = iter(ctx.pull_back(given, ctx.name))
        return (None, None, *(next(pulled) if has_one else None for has_one in ctx.takes))
