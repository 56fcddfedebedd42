"""Adasum of what a step has changed: each rank steps alone, and the steps are combined.

Source: Maleki, Musuvathi et al., Scaling Distributed Training with Adaptive Summation, MLSys 2021, arXiv:2006.02924,
which combines the changes of the parameters, not gradients, where the optimizer is more than plain descent.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from mpitrain.torch.arguments import Reduction
from mpitrain.torch.reductions import Adasum, grouped_allreduce
from mpitrain.torch.starting import Operation

__all__ = ["combined_changes"]

Tensor = torch.Tensor


@contextmanager
def combined_changes(parameters: Sequence[tuple[str, Tensor]], reduction: Reduction) -> Iterator[None]:
    """Replace what the body, a step of this rank, changes by the Adasum of the changes of all ranks.

    Args:
        parameters: (name, parameter) pairs, the same on every rank; each is a vector of its own.
        reduction: Same on every rank: how the changes travel, and among whom.

    Raises:
        HorovodInternalError: Ranks have different parameters, or the body has failed on another rank; on every rank but
            that one. They keep their own steps.
    """
    if not parameters:
        yield
        return
    name = f"adasum.{parameters[0][0]}"
    # The others are about to start it.
    with Operation("allreduce", name, reduction.process_set):
        before = [param.detach().clone() for _, param in parameters]
        yield
        changes = [_as_real(param.detach() - start) for (_, param), start in zip(parameters, before, strict=True)]
    combined = grouped_allreduce(
        changes, name=name, compression=reduction.compression, op=Adasum, process_set=reduction.process_set
    )
    # Torch sees the writing to a parameter that is not detached.
    with torch.no_grad():
        for (_, param), start, change in zip(parameters, before, combined, strict=True):
            _as_real(start).add_(change)
            param.copy_(start)


def _as_real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor
