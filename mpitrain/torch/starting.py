"""Starts a named operation on tensors, and says what becomes of its results."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from mpitrain.torch.handles import register
from mpitrain.torch.world import ProcessSet, negotiator_of

__all__ = ["only_result", "start_named"]

Tensor = torch.Tensor


def only_result(results: list[Any]) -> Any:
    """Return the result of an operation on one tensor."""
    return results[0]


def start_named(
    collective: str,
    tensors: Sequence[Tensor],
    name: str | None,
    process_set: ProcessSet,
    finish: Callable[[list[Any]], Any],
    *,
    in_place: bool = False,
    **details: Any,
) -> int:
    """Start an operation and return its handle.

    Args:
        collective: See `negotiation.Negotiator.start`.
        tensors: One, or all of a grouped operation.
        name: Same on every rank; None counts the operations without a name.
        process_set: Whose ranks take part.
        finish: Makes what `synchronize` returns from the results.
        in_place: Results replace the contents of the tensors, which `finish` gets.
        details: Further arguments of `Negotiator.start`.
    """
    negotiator = negotiator_of(process_set, collective)
    # Unnamed operations carry no collective in their names: one that meets another kind is then a mismatch, not a hang.
    full_name = negotiator.next_name() if name is None else f"{collective}.{name}"
    inputs = [tensor.detach() for tensor in tensors]
    if in_place and not all(tensor.is_contiguous() for tensor in inputs):
        # The result is made in a contiguous copy and written back.
        finish = functools.partial(_write_back, list(tensors), finish)
        inputs = [tensor.contiguous() for tensor in inputs]
    elif in_place:
        finish = functools.partial(_return_own, list(tensors), finish)
    return register(negotiator.start(full_name, collective, inputs, in_place=in_place, **details), finish)


def _return_own(tensors: list[Tensor], finish: Callable[[list[Any]], Any], _results: list[Any]) -> Any:
    # Torch has not seen the writing: without this, a backward pass could use a saved tensor that is another now.
    torch.autograd.graph.increment_version(tensors)
    return finish(tensors)


def _write_back(tensors: list[Tensor], finish: Callable[[list[Any]], Any], results: list[Any]) -> Any:
    with torch.no_grad():
        for tensor, result in zip(tensors, results, strict=True):
            tensor.copy_(result)
    return finish(tensors)
