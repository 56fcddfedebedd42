"""How the learning rate follows the batch.

Source: Goyal et al., Accurate, Large Minibatch SGD: Training ImageNet in 1 Hour, 2017, arXiv:1706.02677,
sections 2.1 and 2.2.
"""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["linear_scaling"]


def linear_scaling(factor: float, warmup_steps: int = 0) -> Callable[[int], float]:
    """Return a function of the step for `torch.optim.lr_scheduler.LambdaLR`: it rises to `factor`, and stays.

    A batch k times as large as the one that the learning rate was found with takes k times the learning rate.
    At the start, when the weights change fast, that is too much: the multiplier goes from 1 to k first.

        LambdaLR(optimizer, linear_scaling(hvd.size(), warmup_steps=500))  # each rank has the original batch

    Args:
        factor: k, which is the number of ranks where every rank has the original batch. A factor below 1
            holds from the first step on.
        warmup_steps: Steps until the multiplier is `factor`.

    Raises:
        ValueError: An argument is out of range.
    """
    if not factor > 0:
        raise ValueError(f"factor: must be positive, got {factor}; pass batch size / original batch size")
    if warmup_steps < 0:
        raise ValueError(f"warmup_steps: must be 0 or more, got {warmup_steps}; 0 is no warm-up")

    def multiplier(step: int) -> float:
        if step >= warmup_steps or factor <= 1.0:
            return factor
        return 1.0 + (factor - 1.0) * step / warmup_steps

    return multiplier
