"""Counts backward passes, parameter by parameter, and knows when a step's gradient is complete."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch

from mpitrain.torch.slots import Slot

__all__ = ["BackwardPasses", "finish_steps"]

Tensor = torch.Tensor


class BackwardPasses:
    """Watches the backward passes of some parameters, and leaves their gradients alone; base of what reduces them.

    A parameter belongs to whatever was made for it last; who loses a parameter so is retired as a whole.

    Args:
        parameters: (name, parameter) pairs.
        passes: Backward passes per step.

    Attributes:
        passes: The same.
        is_in_flight: Whether a gradient is complete whose step has not ended.
    """

    def __init__(self, parameters: Sequence[tuple[str, Tensor]], passes: int) -> None:
        self._serial = next(_serials)
        self.passes = passes
        self.is_in_flight = False
        self._slots: list[Slot] = []
        self._slot_of: dict[Tensor, Slot] = {}
        self._hooks: list[Any] = []
        self._retired = ""
        self._add(parameters)
        _alive.add(self)

    def expect(self, passes: int) -> None:
        """Expect so many backward passes per step from now on."""
        self.passes = passes
        for slot in self._slots:
            slot.passes_left = passes

    def synchronize(self) -> None:
        """End the backward passes of a step.

        Raises:
            RuntimeError: The parameters belong to another one.
        """
        self.check_alive()
        self.end_step()

    def extend(self, parameters: Sequence[tuple[str, Tensor]]) -> None:
        """Take on those parameters that are new; after `synchronize`."""
        self._add([pair for pair in parameters if pair[1] not in self._slot_of])

    def has_all(self, parameters: Sequence[tuple[str, Tensor]]) -> bool:
        """Whether none of the parameters is new."""
        return all(param in self._slot_of for _, param in parameters)

    def give_up(self, params: Sequence[Tensor]) -> None:
        """Retire if one of the parameters is among its own: two would take the gradient from each other."""
        if any(param in self._slot_of for param in params):
            self.retire("its parameters were given to another one")

    def retire(self, reason: str) -> None:
        """Let go of the parameters."""
        self._retired = self._retired or reason
        self.is_in_flight = False
        for hook in self._hooks:
            hook.remove()
        _alive.discard(self)

    def check_alive(self) -> None:
        """Refuse to be used after the end.

        Raises:
            RuntimeError: It has retired.
        """
        if self._retired:
            raise RuntimeError(f"optimizer: cannot be used any more, {self._retired}; wrap the optimizer again")

    def on_complete(self, slot: Slot) -> None:
        """Called by the backward pass in which a gradient is complete, with the gradient in `param.grad`."""

    def end_step(self) -> None:
        """Expect the passes of the next step."""
        self.is_in_flight = False
        for slot in self._slots:
            slot.has_arrived = False
            slot.passes_left = self.passes

    def _add(self, parameters: Sequence[tuple[str, Tensor]]) -> list[Slot]:
        """Make slots for parameters."""
        slots = [
            Slot(position, name, param) for position, (name, param) in enumerate(parameters, start=len(self._slots))
        ]
        for other in list(_alive):
            if other is not self:
                other.give_up([slot.param for slot in slots])
        # The hooks keep nothing alive: a parameter whose optimizer is gone is one like any other.
        on_gradient = _weak_hook(weakref.WeakMethod(self._on_gradient))
        for slot in slots:
            slot.passes_left = self.passes
            self._slots.append(slot)
            self._slot_of[slot.param] = slot
            self._hooks.append(slot.param.register_hook(_guard(weakref.ref(slot))))  # type: ignore[no-untyped-call]
            self._hooks.append(slot.param.register_post_accumulate_grad_hook(on_gradient))  # type: ignore[no-untyped-call]
        return slots

    def _on_gradient(self, param: Tensor) -> None:
        slot = self._slot_of[param]
        slot.passes_left -= 1
        if slot.passes_left <= 0:
            slot.has_arrived = self.is_in_flight = True
            self.on_complete(slot)


_serials = itertools.count()
# What parameters belong to.
_alive: weakref.WeakSet[BackwardPasses] = weakref.WeakSet()


def finish_steps() -> None:
    """Reduce the gradients of backward passes that no step has waited for yet; in one order on all ranks."""
    for passes in sorted(_alive, key=lambda each: each._serial):  # noqa: SLF001  (its own module)
        if passes.is_in_flight:
            passes.synchronize()


def _weak_hook(method: Callable[[], Callable[[Tensor], None] | None]) -> Callable[[Tensor], None]:
    def on_gradient(param: Tensor) -> None:
        if (alive := method()) is not None:
            alive(param)

    return on_gradient


def _guard(slot_ref: Callable[[], Slot | None]) -> Callable[[Tensor], None]:
    """Return a hook that refuses a gradient before it is added to one that is being reduced."""

    def on_backward(_grad: Tensor) -> None:
        if (slot := slot_ref()) is not None and slot.has_arrived:
            raise AssertionError(
                "Gradients were computed more than backward_passes_per_step times before call to step(). "
                f"Increase backward_passes_per_step to accumulate gradients locally (parameter {slot.name!r})."
            )

    return on_backward
