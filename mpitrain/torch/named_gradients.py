"""Gradients that travel by name, each by itself: sparse ones, and those of a compressor that does more than cast.

Named operations need no order, and no memory that was laid out before; what is ready together is fused. Dense gradients
as they are travel in buckets, which is much faster.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from mpitrain.errors import CollectiveError
from mpitrain.torch.arguments import Reduction
from mpitrain.torch.handles import synchronize
from mpitrain.torch.slots import Slot
from mpitrain.torch.sparse import start_sparse_allreduce
from mpitrain.torch.starting import Operation, only_result

__all__ = ["NamedGradients"]

Tensor = torch.Tensor


class NamedGradients:
    """Reduces gradients as named operations.

    Args:
        reduction: How.
    """

    def __init__(self, reduction: Reduction) -> None:
        self._reduction = reduction
        # Of this step: what was started or refused, and what of that is in flight.
        self._begun: dict[Slot, Operation] = {}
        self._in_flight: dict[Slot, Callable[[], Tensor]] = {}

    def start(self, slot: Slot) -> None:
        """Start to reduce a gradient; one that is missing is zero."""
        operation = self._operation_of(slot)
        # An interrupted step may have left it in flight.
        operation.negotiator.await_name(operation.name)
        self._begun[slot] = operation
        with operation:
            param = slot.param
            grad = torch.zeros_like(param) if param.grad is None else param.grad.detach()
            # If only this rank has found the gradient to be sparse, it travels as on the others.
            if self._is_sparse(slot):
                wait = self._start_sparse(operation, grad if grad.is_sparse else grad.to_sparse(slot.sparse_dim))
            else:
                wait = self._start_compressed(operation, slot, grad)
            self._in_flight[slot] = wait

    def finish(self) -> None:
        """Wait for the gradients in flight, and hand them out.

        Raises:
            CollectiveError: One of them failed; the others are handed out.
        """
        failure: CollectiveError | None = None
        for slot in list(self._in_flight):
            try:
                grad = self._in_flight[slot]()
            except CollectiveError as error:
                failure = failure or error
            else:
                # One that was frozen has no gradient, or the optimizer would go on changing it.
                slot.param.grad = grad if slot.param.requires_grad else None
            del self._in_flight[slot]
        self._begun.clear()
        if failure is not None:
            raise failure

    def abandon(self, slots: Sequence[Slot], error: BaseException) -> None:
        """End a step that has failed here: on the other ranks, those of the gradients fail that were not started."""
        for slot in slots:
            if slot in self._begun:
                # It may still be read, so it must not be written to.
                slot.param.grad = None
            else:
                self._operation_of(slot).refuse(error)
        for operation in self._begun.values():
            operation.abandon()
        self._begun.clear()
        self._in_flight.clear()

    def _operation_of(self, slot: Slot) -> Operation:
        collective = "allgather" if self._is_sparse(slot) else "allreduce"
        return Operation(collective, slot.name, self._reduction.process_set)

    def _is_sparse(self, slot: Slot) -> bool:
        return slot.sparse_dim > 0 and self._reduction.keeps_sparse

    def _start_compressed(self, operation: Operation, slot: Slot, grad: Tensor) -> Callable[[], Tensor]:
        reduction = self._reduction
        sparse_dim = grad.sparse_dim() if grad.is_sparse else slot.sparse_dim
        wire, context = reduction.compression.compress(grad.to_dense() if grad.is_sparse else grad)
        handle = operation.start(
            [wire],
            only_result,
            in_place=True,
            op=reduction.op.name.lower(),
            prescale=1.0 / reduction.predivide,
            postscale=reduction.predivide,
        )

        def wait() -> Tensor:
            result = reduction.compression.decompress(synchronize(handle), context)
            return result.to_sparse(sparse_dim) if sparse_dim else result

        return wait

    def _start_sparse(self, operation: Operation, grad: Tensor) -> Callable[[], Tensor]:
        # Entries of one index are added up before they travel.
        wait = start_sparse_allreduce(operation, grad.coalesce(), self._reduction.op)
        return lambda: wait().coalesce()
