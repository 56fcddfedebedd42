"""Gradients that travel by name, each by itself: sparse ones, and those of a compressor that does more than cast.

Named operations need no order, and no memory that was laid out before; what is ready together is fused. Dense gradients
as they are travel in buckets, which is much faster.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from mpitrain.errors import CollectiveError
from mpitrain.torch.arguments import Reduction
from mpitrain.torch.handles import synchronize
from mpitrain.torch.reductions import allreduce_async_
from mpitrain.torch.slots import Slot
from mpitrain.torch.sparse import sparse_allreduce_async

__all__ = ["NamedGradients"]

Tensor = torch.Tensor


class NamedGradients:
    """Reduces gradients as named operations.

    Args:
        reduction: How.
    """

    def __init__(self, reduction: Reduction) -> None:
        self._reduction = reduction
        self._in_flight: list[tuple[Slot, Callable[[], Tensor]]] = []

    def start(self, slot: Slot) -> None:
        """Start to reduce a gradient; one that is missing is zero."""
        param = slot.param
        grad = torch.zeros_like(param) if param.grad is None else param.grad.detach()
        # If only this rank has found the gradient to be sparse, it travels as on the others.
        if slot.sparse_dim and self._reduction.keeps_sparse:
            wait = self._start_sparse(slot, grad if grad.is_sparse else grad.to_sparse(slot.sparse_dim))
        else:
            wait = self._start_compressed(slot, grad)
        self._in_flight.append((slot, wait))

    def finish(self) -> None:
        """Wait for the gradients in flight, and hand them out.

        Raises:
            CollectiveError: One of them failed; the others are handed out.
        """
        in_flight, self._in_flight = self._in_flight, []
        failure: CollectiveError | None = None
        for slot, wait in in_flight:
            try:
                grad = wait()
            except CollectiveError as error:
                failure = failure or error
                continue
            # One that was frozen has no gradient, or the optimizer would go on changing it.
            slot.param.grad = grad if slot.param.requires_grad else None
        if failure is not None:
            raise failure

    def _start_compressed(self, slot: Slot, grad: Tensor) -> Callable[[], Tensor]:
        reduction = self._reduction
        sparse_dim = grad.sparse_dim() if grad.is_sparse else slot.sparse_dim
        wire, context = reduction.compression.compress(grad.to_dense() if grad.is_sparse else grad)
        handle = allreduce_async_(
            wire,
            name=slot.name,
            op=reduction.op,
            prescale_factor=1.0 / reduction.predivide,
            postscale_factor=reduction.predivide,
            process_set=reduction.process_set,
        )

        def wait() -> Tensor:
            result = reduction.compression.decompress(synchronize(handle), context)
            return result.to_sparse(sparse_dim) if sparse_dim else result

        return wait

    def _start_sparse(self, slot: Slot, grad: Tensor) -> Callable[[], Tensor]:
        # Entries of one index are added up before they travel.
        wait = sparse_allreduce_async(grad.coalesce(), slot.name, self._reduction.op, self._reduction.process_set)
        return lambda: wait().coalesce()
