"""Where gradients lie: a slot per parameter, and buckets of slots that are reduced together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from mpitrain.collectives import Handle, PersistentPlan

__all__ = ["Bucket", "Slot", "set_aside"]

Tensor = torch.Tensor


class Slot:
    """The place of one parameter's gradient.

    Args:
        position: Among the slots of the reducer.
        name: Of the parameter.
        param: The parameter.

    Attributes:
        passes_left: Backward passes to come before the gradient is reduced.
        has_arrived: Whether all passes have come, and the gradient is not synchronized yet.
        sparse_dim: Number of sparse dimensions of the gradient; 0 if it is dense.
        devices: Kinds of device that the parameter lies on, by rank.
        bucket: Position among the buckets; -1 if the gradient travels by name. (The bucket itself would make a cycle,
            which dies late.)
        view: The gradient's part of the bucket, in the shape of the parameter.
    """

    __slots__ = (
        "__weakref__",
        "bucket",
        "devices",
        "has_arrived",
        "name",
        "param",
        "passes_left",
        "position",
        "sparse_dim",
        "view",
    )

    def __init__(self, position: int, name: str, param: Tensor) -> None:
        self.position = position
        self.name = name
        self.param = param
        self.passes_left = 0
        self.has_arrived = False
        self.sparse_dim = 0
        self.devices: tuple[str, ...] = ()
        self.bucket = -1
        self.view: Tensor

    def describe(self) -> str:
        """Return what must be the same on every rank."""
        return f"{self.name}: {self.param.dtype} {list(self.param.shape)}"


class Bucket:
    """Gradients that are reduced together.

    Args:
        position: Among the buckets.
        slots: Of the gradients, in the order in which they lie in the buffer.
        buffer: Flat; holds all of them.
        plan: All-reduces the buffer.

    Attributes:
        missing: How many gradients are not in the buffer yet.
        handle: Of the reduction in flight.
    """

    __slots__ = ("_version", "buffer", "handle", "missing", "plan", "slots")

    def __init__(self, position: int, slots: list[Slot], buffer: Tensor, plan: PersistentPlan) -> None:
        self.slots = slots
        self.buffer = buffer
        self.plan = plan
        self.missing = len(slots)
        self.handle: Handle[Any] | None = None
        self._version = 0
        offset = 0
        for slot in slots:
            count = slot.param.numel()
            slot.bucket = position
            slot.view = buffer[offset : offset + count].view(slot.param.shape)
            offset += count

    def take(self, slot: Slot, factor: float) -> None:
        """Move a gradient into the bucket, multiplied by `factor`; `param.grad` is its place in the bucket then."""
        self._fill(slot, factor)
        self.missing -= 1

    def start(self) -> None:
        """Start the reduction; all gradients are in the bucket."""
        self._version = self.buffer._version  # noqa: SLF001  (torch has no other way to ask)
        self.handle = self.plan.start()

    def finish(self, factor: float) -> bool:
        """Wait for the reduction, multiply the result by `factor`, and hand the gradients out.

        Returns:
            Whether nobody has changed the gradients meanwhile.
        """
        assert self.handle is not None
        self.handle.wait()
        self.handle = None
        self.missing = len(self.slots)
        is_unchanged = self.buffer._version == self._version  # noqa: SLF001
        for slot, grad in zip(self.slots, self._results(factor), strict=True):
            # One that was frozen has no gradient, or the optimizer would go on changing it.
            if not slot.param.requires_grad:
                continue
            if slot.sparse_dim:
                slot.param.grad = grad.to_sparse(slot.sparse_dim)
            elif slot.param.grad is not grad:
                slot.param.grad = grad
        return is_unchanged

    def _fill(self, slot: Slot, factor: float) -> None:
        param, view = slot.param, slot.view
        grad = param.grad
        if grad is None:
            view.zero_()
        elif grad is not view or factor != 1.0:
            grad = self.value_of(slot)
            if factor == 1.0:
                view.copy_(grad)
            else:
                torch.mul(grad, factor, out=view)
        self.point_to(slot)

    def _results(self, factor: float) -> list[Tensor]:
        """Return the gradients, of the dtypes of the parameters."""
        if factor != 1.0:
            self.buffer.mul_(factor)
        # What is of this dtype already stays where it is.
        return [
            slot.view if slot.view.dtype == slot.param.dtype else slot.view.to(slot.param.dtype) for slot in self.slots
        ]

    @staticmethod
    def value_of(slot: Slot) -> Tensor:
        """Return the gradient as a dense tensor, and note if it is sparse."""
        assert slot.param.grad is not None
        # Of a backward pass that creates a graph, the value is taken.
        grad = slot.param.grad.detach()
        if grad.is_sparse:
            slot.sparse_dim = grad.sparse_dim()
            grad = grad.to_dense()
        return grad

    @staticmethod
    def point_to(slot: Slot) -> None:
        """Let `param.grad` be its place in the bucket, if that is of its dtype."""
        if not slot.param.requires_grad:
            slot.param.grad = None
        elif slot.view.dtype == slot.param.dtype:
            slot.param.grad = slot.view


@contextmanager
def set_aside(slots: Sequence[Slot]) -> Iterator[None]:
    """Let parameters have no gradients for the length of a `with` block, which overwrites the buckets."""
    grads = [slot.param.grad for slot in slots]
    kept = [
        grad.clone() if grad is not None and slot.bucket >= 0 and grad is slot.view else grad
        for slot, grad in zip(slots, grads, strict=True)
    ]
    for slot in slots:
        slot.param.grad = None
    try:
        yield
    finally:
        for slot, grad in zip(slots, kept, strict=True):
            slot.param.grad = grad
