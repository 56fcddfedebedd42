"""Adasum of what a step has changed: each rank steps alone, and the steps are combined.

Source: Maleki, Musuvathi et al., Scaling Distributed Training with Adaptive Summation, MLSys 2021, arXiv:2006.02924,
which combines the changes of the parameters, not gradients, where the optimizer is more than plain descent.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mpitrain.torch.arguments import Reduction
from mpitrain.torch.reductions import Adasum, grouped_allreduce

__all__ = ["combine_changes"]

Tensor = torch.Tensor


def combine_changes(parameters: Sequence[tuple[str, Tensor]], before: Sequence[Tensor], reduction: Reduction) -> None:
    """Replace what a step of this rank has changed by the Adasum over all ranks.

    Args:
        parameters: (name, parameter) pairs, the same on every rank; each is a vector of its own.
        before: What the parameters were before the step; is overwritten.
        reduction: Same on every rank: how the changes travel, and among whom.

    Raises:
        HorovodInternalError: Ranks have different parameters; on every rank, which keep their own steps.
    """
    if not parameters:
        return
    params = [param.detach() for _, param in parameters]
    changes = [_as_real(param - start) for param, start in zip(params, before, strict=True)]
    combined = grouped_allreduce(
        changes,
        name=f"adasum.{parameters[0][0]}",
        compression=reduction.compression,
        op=Adasum,
        process_set=reduction.process_set,
    )
    # Torch sees the writing to a parameter that is not detached.
    with torch.no_grad():
        for (_, param), start, change in zip(parameters, before, combined, strict=True):
            _as_real(start).add_(change)
            param.copy_(start)


def _as_real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor
