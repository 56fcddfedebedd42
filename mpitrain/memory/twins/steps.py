"""What an optimizer step is told besides the arrays, with the names and the meaning of `torch.optim`."""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["AdamStep", "MomentumStep"]


@dataclass(frozen=True, slots=True, kw_only=True)
class MomentumStep:
    """One step of `torch.optim.SGD`.

    Attributes:
        lr: Learning rate.
        momentum: 0 for plain SGD, which needs no momentum buffer.
        dampening: What the gradient is weighted down by, 1 - dampening, in the momentum.
        weight_decay: Added to the gradient, times the parameter.
        nesterov: Look ahead.
        is_first: The momentum is then the gradient itself.
        gradient_scale: What gradients are multiplied by before anything else.
    """

    lr: float
    momentum: float = 0.0
    dampening: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False
    is_first: bool = False
    gradient_scale: float = 1.0

    def numbers(self) -> tuple[float, float, float, float, float]:
        """Return the numbers of the kernel in its order, which are rounded to the type that it computes in."""
        return self.lr, self.momentum, 1 - self.dampening, self.weight_decay, self.gradient_scale


@dataclass(frozen=True, slots=True, kw_only=True)
class AdamStep:
    """One step of `torch.optim.Adam`, or of `AdamW` where the weight decay is decoupled.

    Attributes:
        lr: Learning rate.
        betas: Decay of the running mean of gradients and of that of their squares.
        eps: Added to the root of the second one.
        weight_decay: Of the parameter.
        is_decoupled: The parameter decays by itself (AdamW), else by way of the gradient (Adam).
        step: Number of this step, from 1 on.
        gradient_scale: What gradients are multiplied by before anything else.
    """

    lr: float
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    is_decoupled: bool = False
    step: int
    gradient_scale: float = 1.0

    def numbers(self) -> tuple[float, ...]:
        """Return the numbers of the kernel in its order, which are rounded to the type that it computes in."""
        beta1, beta2 = self.betas
        return (
            1 - self.lr * self.weight_decay if self.is_decoupled else 1.0,
            0.0 if self.is_decoupled else self.weight_decay,
            1 - beta1,
            beta2,
            1 - beta2,
            self.lr / (1 - beta1**self.step),
            math.sqrt(1 - beta2**self.step),
            self.eps,
            self.gradient_scale,
        )
