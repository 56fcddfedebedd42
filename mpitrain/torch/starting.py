"""Starts a named operation on tensors, and says what becomes of its results."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, final

import torch

from mpitrain.memory import check_op, dtype_of_torch, parse_op
from mpitrain.torch.handles import forget, register, synchronize
from mpitrain.torch.world import ProcessSet, negotiator_of

__all__ = ["Operation", "only_result"]

Tensor = torch.Tensor


def only_result(results: list[Any]) -> Any:
    """Return the result of an operation on one tensor."""
    return results[0]


@final
class Operation:
    """A named operation that this rank is about to start, within a `with` block that prepares it and starts it.

    Whatever raises in the block before the start, be it a bad argument, memory that is not to be had or an interrupt,
    is announced as a refusal: the other ranks get an error instead of waiting. What raises after it abandons the
    operation here, which goes on.

        with Operation("allgather", name, process_set) as operation:
            handle = operation.start([prepared(tensor)], only_result)

    A block may also check only, if what it has not refused is started under the same name afterwards.

    Args:
        collective: See `negotiation.Announcement`.
        name: Same on every rank; None counts the operations without a name.
        process_set: Whose ranks take part.

    Attributes:
        collective: As given.
        is_named: Whether a name was given.
        name: Under which the ranks match it.
        negotiator: Of the process set.

    Raises:
        NotInitializedError: Before `init`.
        ValueError: The set was not added, or does not include this rank.
    """

    def __init__(self, collective: str, name: str | None, process_set: ProcessSet) -> None:
        self.negotiator = negotiator_of(process_set, collective)
        self.collective = collective
        self.is_named = name is not None
        # Unnamed operations carry no collective in their names: one that meets another kind is then a mismatch, not a
        # hang.
        self.name = self.negotiator.next_name() if name is None else f"{collective}.{name}"
        self._is_announced = False
        self._handle: int | None = None

    def __enter__(self) -> Operation:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            return
        if self._is_announced:
            self.abandon()
        else:
            self.refuse(error)

    def refuse(self, error: BaseException) -> None:
        """Let the other ranks know that this one cannot take part, and why."""
        self.negotiator.refuse(self.name, self.collective, f"{type(error).__name__}: {error}")

    def abandon(self) -> None:
        """Let nobody ask for the result of what was started; without a start it does nothing."""
        if self._handle is not None:
            forget(self._handle)

    def start(
        self,
        tensors: Sequence[Tensor],
        finish: Callable[[list[Any]], Any],
        *,
        in_place: bool = False,
        **details: Any,
    ) -> int:
        """Start and return a handle.

        Args:
            tensors: One, or all of a grouped operation.
            finish: Makes what `synchronize` returns from the results.
            in_place: Results replace the contents of the tensors, which `finish` gets.
            details: Further arguments of `Negotiator.start`.

        Raises:
            ValueError: A tensor that cannot be communicated or reduced, or a name in flight.
            TypeError: Not a tensor.
            RuntimeError: Tensors on different devices.
        """
        inputs, finish = self._prepare(tensors, finish, in_place=in_place, details=details)
        handle = self.negotiator.start(self.name, self.collective, inputs, in_place=in_place, **details)
        self._note_start()
        self._handle = register(handle, finish)
        return self._handle

    def reduce(
        self, tensors: Sequence[Tensor], finish: Callable[[list[Any]], Any], *, in_place: bool = False, **details: Any
    ) -> Any:
        """Run an all-reduce to its end, and return what `finish` makes of it. See `start`.

        Raises:
            HorovodInternalError: The operation failed.
        """
        inputs, finish = self._prepare(tensors, finish, in_place=in_place, details=details)
        results: Any = None
        if len(inputs) == 1:
            (tensor,) = inputs
            results = self.negotiator.reduce(self.name, tensor, in_place=in_place, on_start=self._note_start, **details)
        if results is None:
            results = self.negotiator.start(self.name, self.collective, inputs, in_place=in_place, **details)
        self._note_start()
        if isinstance(results, list):
            return finish(results)
        self._handle = register(results, finish)
        return synchronize(self._handle)

    def _prepare(
        self,
        tensors: Sequence[Tensor],
        finish: Callable[[list[Any]], Any],
        *,
        in_place: bool,
        details: dict[str, Any],
    ) -> tuple[list[Tensor], Callable[[list[Any]], Any]]:
        """Return what is communicated, outside autograd, and what makes the result of that."""
        for tensor in tensors:
            _check(tensor, self.collective, details)
        if len({tensor.device for tensor in tensors}) > 1:
            devices = sorted({str(tensor.device) for tensor in tensors})
            raise RuntimeError(f"Tensors in list must be on same device, got {', '.join(devices)}; move them")
        inputs = [tensor.detach() for tensor in tensors]
        if in_place and not all(tensor.is_contiguous() for tensor in inputs):
            # The result is made in a contiguous copy and written back.
            finish = functools.partial(_write_back, list(tensors), finish)
            inputs = [tensor.contiguous() for tensor in inputs]
        elif in_place:
            finish = functools.partial(_return_own, list(tensors), finish)
        return inputs, finish

    def _note_start(self) -> None:
        self._is_announced = True


def _check(tensor: Tensor, collective: str, details: dict[str, Any]) -> None:
    """Refuse, as Horovod with a ValueError, what has no meaning on any rank."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{collective}: must be a tensor, got {type(tensor).__qualname__}; pass torch.as_tensor(...)")
    if tensor.layout is not torch.strided:
        raise ValueError(
            f"Tensor type {tensor.type()} is not supported, got layout {tensor.layout}; "
            "pass tensor.to_dense(), or reduce it with sparse_allreduce_async"
        )
    try:
        dtype = dtype_of_torch(tensor.dtype, subject=collective)
        if "op" in details:
            check_op(parse_op(details["op"]), dtype)
    except TypeError as error:
        raise ValueError(f"Tensor type {tensor.type()} is not supported: {error}") from None
    factors = (details.get("prescale", 1.0), details.get("postscale", 1.0))
    if dtype.kind == "bool" and factors != (1.0, 1.0):
        raise ValueError(f"{collective}: bool cannot be scaled, got factors {factors}; convert to a number dtype")


def _return_own(tensors: list[Tensor], finish: Callable[[list[Any]], Any], _results: list[Any]) -> Any:
    # Torch has not seen the writing: without this, a backward pass could use a saved tensor that is another now.
    torch.autograd.graph.increment_version(tensors)
    return finish(tensors)


def _write_back(tensors: list[Tensor], finish: Callable[[list[Any]], Any], results: list[Any]) -> Any:
    with torch.no_grad():
        for tensor, result in zip(tensors, results, strict=True):
            tensor.copy_(result)
    return finish(tensors)
