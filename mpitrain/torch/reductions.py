"""Reductions of tensors by name: all-reduce and reduce-scatter, with Horovod's names and arguments.

Ranks may start operations in any order; those of one name belong together. Operations without a name are matched by
how many were started before on each rank. A mismatch raises `HorovodInternalError` on every rank, and everything
stays usable.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch

from mpitrain.memory import ReduceOp, parse_op
from mpitrain.torch.compression import Compression, Compressor
from mpitrain.torch.handles import synchronize
from mpitrain.torch.starting import only_result, start_named
from mpitrain.torch.world import ProcessSet, global_process_set

__all__ = [
    "Adasum",
    "Average",
    "Max",
    "Min",
    "Product",
    "Sum",
    "allreduce",
    "allreduce_",
    "allreduce_async",
    "allreduce_async_",
    "grouped_allreduce",
    "grouped_allreduce_",
    "grouped_allreduce_async",
    "grouped_allreduce_async_",
    "reducescatter",
    "reducescatter_async",
]

Average = ReduceOp.AVERAGE
Sum = ReduceOp.SUM
Adasum = ReduceOp.ADASUM
Min = ReduceOp.MIN
Max = ReduceOp.MAX
Product = ReduceOp.PRODUCT

Tensor = torch.Tensor


def allreduce_async(
    tensor: Tensor,
    average: bool | None = None,
    name: str | None = None,
    op: ReduceOp | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> int:
    """Start an `allreduce`; returns a handle for `poll` and `synchronize`."""
    reduction = _reduction(average, op)
    return _start_allreduce([tensor], name, reduction, prescale_factor, postscale_factor, process_set, only_result)


def allreduce_async_(
    tensor: Tensor,
    average: bool | None = None,
    name: str | None = None,
    op: ReduceOp | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> int:
    """Start an `allreduce_`; returns a handle. The tensor must be left alone until it is synchronized."""
    reduction = _reduction(average, op)
    return _start_allreduce(
        [tensor], name, reduction, prescale_factor, postscale_factor, process_set, only_result, True
    )


def allreduce(
    tensor: Tensor,
    average: bool | None = None,
    name: str | None = None,
    compression: type[Compressor] = Compression.none,
    op: ReduceOp | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> Tensor:
    """Reduce a tensor over all ranks.

    Args:
        tensor: Any shape; shape and dtype the same on every rank.
        average: Older spelling of `op`: True is `Average`, False is `Sum`.
        name: Same on every rank.
        compression: How the tensor travels.
        op: `Average` (default), `Sum`, `Adasum`, `Min`, `Max` or `Product`. Averages of integers are truncated toward
            zero. `Adasum` takes floating-point tensors, and any number of ranks: where that is no power of two, the
            first ranks are combined in pairs before.
        prescale_factor: Multiplies the tensor before the reduction.
        postscale_factor: Multiplies the result.
        process_set: Whose ranks take part.

    Returns:
        A new tensor of the same shape and dtype.

    Raises:
        HorovodInternalError: Ranks brought different things, or could not exchange messages; on every rank.
        ValueError: Bad argument, or a name in flight.
    """
    compressed, context = compression.compress(tensor)
    handle = allreduce_async(compressed, average, name, op, prescale_factor, postscale_factor, process_set)
    return compression.decompress(synchronize(handle), context)


def allreduce_(
    tensor: Tensor,
    average: bool | None = None,
    name: str | None = None,
    op: ReduceOp | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> Tensor:
    """Reduce a tensor over all ranks in place; see `allreduce`."""
    return synchronize(  # type: ignore[no-any-return]
        allreduce_async_(tensor, average, name, op, prescale_factor, postscale_factor, process_set)
    )


def grouped_allreduce_async(
    tensors: Sequence[Tensor],
    average: bool | None = None,
    name: str | None = None,
    op: ReduceOp | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> int:
    """Start a `grouped_allreduce`; returns one handle."""
    reduction = _reduction(average, op)
    return _start_allreduce(tensors, name, reduction, prescale_factor, postscale_factor, process_set, list)


def grouped_allreduce_async_(
    tensors: Sequence[Tensor],
    average: bool | None = None,
    name: str | None = None,
    op: ReduceOp | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> int:
    """Start a `grouped_allreduce_`; returns one handle."""
    reduction = _reduction(average, op)
    return _start_allreduce(tensors, name, reduction, prescale_factor, postscale_factor, process_set, list, True)


def grouped_allreduce(
    tensors: Sequence[Tensor],
    average: bool | None = None,
    name: str | None = None,
    compression: type[Compressor] = Compression.none,
    op: ReduceOp | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> list[Tensor]:
    """Reduce several tensors together, all or none; see `allreduce`. `Adasum` combines each tensor by itself."""
    pairs = [compression.compress(tensor) for tensor in tensors]
    compressed = [tensor for tensor, _ in pairs]
    handle = grouped_allreduce_async(compressed, average, name, op, prescale_factor, postscale_factor, process_set)
    return [
        compression.decompress(result, context) for result, (_, context) in zip(synchronize(handle), pairs, strict=True)
    ]


def grouped_allreduce_(
    tensors: Sequence[Tensor],
    average: bool | None = None,
    name: str | None = None,
    op: ReduceOp | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> list[Tensor]:
    """Reduce several tensors together in place, all or none; see `allreduce`."""
    return synchronize(  # type: ignore[no-any-return]
        grouped_allreduce_async_(tensors, average, name, op, prescale_factor, postscale_factor, process_set)
    )


def reducescatter_async(
    tensor: Tensor,
    name: str | None = None,
    op: ReduceOp = Average,
    process_set: ProcessSet = global_process_set,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> int:
    """Start a `reducescatter`; returns a handle."""
    if op == Adasum:
        raise ValueError("Reducescatter does not support Adasum, which combines whole tensors; use allreduce")
    if tensor.dim() == 0:
        raise ValueError("Reducescatter does not support scalar inputs, got shape (); reshape the tensor")
    return start_named(
        "reduce_scatter",
        [tensor],
        name,
        process_set,
        only_result,
        op=_reduction(None, op).name.lower(),
        prescale=float(prescale_factor),
        postscale=float(postscale_factor),
    )


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
        ValueError: Bad argument, or a name in flight.
    """
    compressed, context = compression.compress(tensor)
    handle = reducescatter_async(compressed, name, op, process_set, prescale_factor, postscale_factor)
    return compression.decompress(synchronize(handle), context)


def _start_allreduce(
    tensors: Sequence[Tensor],
    name: str | None,
    reduction: ReduceOp,
    prescale_factor: float,
    postscale_factor: float,
    process_set: ProcessSet,
    finish: Callable[[list[Any]], Any],
    in_place: bool = False,
) -> int:
    return start_named(
        "allreduce",
        tensors,
        name,
        process_set,
        finish,
        in_place=in_place,
        op=reduction.name.lower(),
        prescale=float(prescale_factor),
        postscale=float(postscale_factor),
    )


def _reduction(average: bool | None, op: ReduceOp | int | None) -> ReduceOp:
    if average is not None:
        if op is not None:
            raise ValueError("The op parameter supersedes average, got both; pass op only")
        warnings.warn("Parameter `average` has been replaced with `op`", DeprecationWarning, stacklevel=4)
        return Average if average else Sum
    return Average if op is None else parse_op(op)
