"""Reduce-scatter of tensors by name, with Horovod's names and arguments.

See `reductions` for how names match. Gradients are pulled back as Horovod does: they are gathered from all ranks, and
multiplied by the factors and, for a sum, by the number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from mpitrain.memory import ReduceOp, parse_op
from mpitrain.torch.compression import Compression, Compressor
from mpitrain.torch.gathers import grouped_allgather
from mpitrain.torch.gradients import PullBack, carry_gradients
from mpitrain.torch.handles import synchronize
from mpitrain.torch.reductions import Average, Sum
from mpitrain.torch.starting import Operation, only_result
from mpitrain.torch.world import ProcessSet, global_process_set

__all__ = ["grouped_reducescatter", "grouped_reducescatter_async", "reducescatter", "reducescatter_async"]

Tensor = torch.Tensor


def reducescatter_async(
    tensor: Tensor,
    name: str | None = None,
    op: ReduceOp = Average,
    process_set: ProcessSet = global_process_set,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> int:
    """Start a `reducescatter`; returns a handle."""
    with Operation("reduce_scatter", name, process_set) as operation:
        how = _How(parse_op(op), float(prescale_factor), float(postscale_factor))
        return _start(operation, [tensor], how, only_result)


def reducescatter(
    tensor: Tensor,
    name: str | None = None,
    compression: type[Compressor] = Compression.none,
    op: ReduceOp = Average,
    process_set: ProcessSet = global_process_set,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> Tensor:
    """Reduce a tensor over all ranks and return this rank's part of it along the first dimension.

    Where the first dimension does not divide, the first ranks get one row more. Arguments as for `allreduce`.

    Raises:
        HorovodInternalError: Ranks brought different things, or could not exchange messages; on every rank.
        ValueError: Bad argument, a dtype that the reduction is not defined for, or a name in flight.
    """
    (result,) = grouped_reducescatter([tensor], name, compression, op, process_set, prescale_factor, postscale_factor)
    return result


def grouped_reducescatter_async(
    tensors: Sequence[Tensor],
    name: str | None = None,
    op: ReduceOp = Average,
    process_set: ProcessSet = global_process_set,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> int:
    """Start a `grouped_reducescatter`; returns one handle, of a tuple."""
    with Operation("reduce_scatter", name, process_set) as operation:
        how = _How(parse_op(op), float(prescale_factor), float(postscale_factor))
        return _start(operation, tensors, how, tuple)


def grouped_reducescatter(
    tensors: Sequence[Tensor],
    name: str | None = None,
    compression: type[Compressor] = Compression.none,
    op: ReduceOp = Average,
    process_set: ProcessSet = global_process_set,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> list[Tensor]:
    """Reduce-scatter several tensors together, all or none; see `reducescatter`."""
    with Operation("reduce_scatter", name, process_set) as operation:
        how = _How(parse_op(op), float(prescale_factor), float(postscale_factor))
        pairs = [compression.compress(tensor) for tensor in tensors]
        inputs = [compressed for compressed, _ in pairs]

        def run() -> tuple[Sequence[Tensor], PullBack]:
            results = synchronize(_start(operation, inputs, how, list))
            return results, pull_back

        def pull_back(gradients: list[Tensor], other_name: str) -> list[Tensor]:
            if how.op not in (Average, Sum):
                raise ValueError(f"reducescatter: {how.op.name.lower()} has no gradient; use Average or Sum")
            factor = how.prescale * how.postscale * (operation.negotiator.comm.size if how.op is Sum else 1)
            scaled = [gradient * factor if factor != 1.0 else gradient for gradient in gradients]
            return grouped_allgather(scaled, other_name, process_set)

        results = carry_gradients(operation, inputs, run)
        return [compression.decompress(result, context) for result, (_, context) in zip(results, pairs, strict=True)]


class _How(NamedTuple):
    op: ReduceOp
    prescale: float
    postscale: float


def _start(operation: Operation, tensors: Sequence[Tensor], how: _How, finish: Callable[[list[Any]], Any]) -> int:
    if how.op is ReduceOp.ADASUM:
        raise ValueError("Reducescatter does not support Adasum, which combines whole tensors; use allreduce")
    if any(tensor.dim() == 0 for tensor in tensors):
        raise ValueError("Reducescatter does not support scalar inputs, got shape (); reshape the tensor")
    return operation.start(tensors, finish, op=how.op.name.lower(), prescale=how.prescale, postscale=how.postscale)
