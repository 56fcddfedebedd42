"""Collectives on tensors by name, with Horovod's names and arguments.

Ranks may start operations in any order; those of one name belong together. Operations without a name are matched by
how many were started before on each rank. A mismatch raises `HorovodInternalError` on every rank, and
everything stays usable.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch

from mpitrain.memory import ReduceOp, parse_op
from mpitrain.torch.compression import Compression, Compressor
from mpitrain.torch.handles import register, synchronize
from mpitrain.torch.world import ProcessSet, global_process_set, negotiator_of

__all__ = [
    "Average",
    "Max",
    "Min",
    "Product",
    "Sum",
    "allgather",
    "allgather_async",
    "allreduce",
    "allreduce_",
    "allreduce_async",
    "allreduce_async_",
    "alltoall",
    "alltoall_async",
    "barrier",
    "broadcast",
    "broadcast_",
    "broadcast_async",
    "broadcast_async_",
    "grouped_allreduce",
    "grouped_allreduce_",
    "grouped_allreduce_async",
    "grouped_allreduce_async_",
    "reducescatter",
    "reducescatter_async",
    "root_of",
]

Average = ReduceOp.AVERAGE
Sum = ReduceOp.SUM
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
    return _start_allreduce([tensor], name, reduction, prescale_factor, postscale_factor, process_set, _first)


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
    return _start_allreduce([tensor], name, reduction, prescale_factor, postscale_factor, process_set, _first, True)


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
        op: `Average` (default), `Sum`, `Min`, `Max` or `Product`. Averages of integers are truncated toward zero.
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
    """Reduce several tensors together, all or none; see `allreduce`."""
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


def allgather_async(tensor: Tensor, name: str | None = None, process_set: ProcessSet = global_process_set) -> int:
    """Start an `allgather`; returns a handle."""
    return _start("allgather", [tensor], name, process_set, _first)


def allgather(tensor: Tensor, name: str | None = None, process_set: ProcessSet = global_process_set) -> Tensor:
    """Concatenate the tensors of all ranks along the first dimension, in rank order.

    Args:
        tensor: Dtype and all dimensions but the first the same on every rank. Without dimensions it is one row.
        name: Same on every rank.
        process_set: Whose ranks take part.

    Raises:
        HorovodInternalError: Ranks brought different things, or could not exchange messages; on every rank.
        ValueError: Bad argument, or a name in flight.
    """
    return synchronize(allgather_async(tensor, name, process_set))  # type: ignore[no-any-return]


def broadcast_async(
    tensor: Tensor, root_rank: int, name: str | None = None, process_set: ProcessSet = global_process_set
) -> int:
    """Start a `broadcast`; returns a handle."""
    return _start("broadcast", [tensor], name, process_set, _first, root=root_of(root_rank, process_set))


def broadcast_async_(
    tensor: Tensor, root_rank: int, name: str | None = None, process_set: ProcessSet = global_process_set
) -> int:
    """Start a `broadcast_`; returns a handle."""
    root = root_of(root_rank, process_set)
    return _start("broadcast", [tensor], name, process_set, _first, root=root, in_place=True)


def broadcast(
    tensor: Tensor, root_rank: int, name: str | None = None, process_set: ProcessSet = global_process_set
) -> Tensor:
    """Return the root's tensor on every rank.

    Args:
        tensor: Shape and dtype the same on every rank; the values matter on the root only.
        root_rank: Global rank, also with a process set.
        name: Same on every rank.
        process_set: Whose ranks take part.

    Raises:
        HorovodInternalError: Ranks brought different things, or could not exchange messages; on every rank.
        ValueError: Root out of range, or a name in flight.
    """
    return synchronize(broadcast_async(tensor, root_rank, name, process_set))  # type: ignore[no-any-return]


def broadcast_(
    tensor: Tensor, root_rank: int, name: str | None = None, process_set: ProcessSet = global_process_set
) -> Tensor:
    """Copy the root's tensor into those of all other ranks; see `broadcast`."""
    return synchronize(broadcast_async_(tensor, root_rank, name, process_set))  # type: ignore[no-any-return]


def alltoall_async(
    tensor: Tensor,
    splits: Tensor | Sequence[int] | None = None,
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
) -> int:
    """Start an `alltoall`; returns a handle. `synchronize` always returns the pair with the received splits."""
    return _start_alltoall(tensor, splits, name, process_set, with_splits=True)


def alltoall(
    tensor: Tensor,
    splits: Tensor | Sequence[int] | None = None,
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
) -> Tensor | tuple[Tensor, Tensor]:
    """Send one part of the tensor, cut along the first dimension, to each rank.

    Args:
        tensor: Dtype and all dimensions but the first the same on every rank.
        splits: How many rows go to each rank, integers; None cuts evenly.
        name: Same on every rank.
        process_set: Whose ranks take part.

    Returns:
        What came from all ranks, in rank order; with `splits`, a pair with how many rows came from each.

    Raises:
        HorovodInternalError: Ranks brought different things, or could not exchange messages; on every rank.
        ValueError: Splits that do not fit, or a name in flight.
    """
    handle = _start_alltoall(tensor, splits, name, process_set, with_splits=splits is not None)
    return synchronize(handle)  # type: ignore[no-any-return]


def reducescatter_async(
    tensor: Tensor,
    name: str | None = None,
    op: ReduceOp = Average,
    process_set: ProcessSet = global_process_set,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> int:
    """Start a `reducescatter`; returns a handle."""
    if tensor.dim() == 0:
        raise ValueError("Reducescatter does not support scalar inputs, got shape (); reshape the tensor")
    return _start(
        "reduce_scatter",
        [tensor],
        name,
        process_set,
        _first,
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


def barrier(process_set: ProcessSet = global_process_set) -> None:
    """Return when all ranks have called."""
    synchronize(_start("barrier", [], "barrier", process_set, lambda _results: None))


def _first(results: list[Any]) -> Any:
    return results[0]


def _start(
    collective: str,
    tensors: Sequence[Tensor],
    name: str | None,
    process_set: ProcessSet,
    finish: Callable[[list[Any]], Any],
    *,
    in_place: bool = False,
    **details: Any,
) -> int:
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
    return _start(
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


def _start_alltoall(
    tensor: Tensor,
    splits: Tensor | Sequence[int] | None,
    name: str | None,
    process_set: ProcessSet,
    *,
    with_splits: bool,
) -> int:
    size = negotiator_of(process_set, "alltoall").comm.size
    rows = _split_rows(tensor, splits, size)
    device = splits.device if isinstance(splits, torch.Tensor) else None

    def finish(results: list[Any]) -> Any:
        output, received = results[0]
        return (output, torch.tensor(received, dtype=torch.int32, device=device)) if with_splits else output

    return _start("alltoall", [tensor], name, process_set, finish, splits=rows)


def _split_rows(tensor: Tensor, splits: Tensor | Sequence[int] | None, size: int) -> list[int]:
    if tensor.dim() == 0:
        raise ValueError("alltoall: tensor must have a dimension to cut along, got shape (); reshape the tensor")
    if splits is None:
        if tensor.shape[0] % size:
            raise ValueError(
                "splits not provided, but first dimension of tensor is not an even multiple of the number of workers, "
                f"got {tensor.shape[0]} rows for {size}; pass splits"
            )
        return [tensor.shape[0] // size] * size
    if isinstance(splits, torch.Tensor) and splits.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"alltoall expects splits to contain 32-bit integer elements, got {splits.dtype}; convert them"
        )
    rows = [int(row) for row in (splits.tolist() if isinstance(splits, torch.Tensor) else splits)]
    if len(rows) != size:
        raise ValueError(f"Number of entries in splits does not equal number of workers, got {len(rows)} for {size}")
    if sum(rows) > tensor.shape[0] or min(rows) < 0:
        raise ValueError(
            "Sum of splits entries is greater than the first dimension of tensor, or one is negative, "
            f"got {rows} for {tensor.shape[0]} rows"
        )
    return rows


def root_of(root_rank: int, process_set: ProcessSet) -> int:
    """Return the rank within the set of a global root rank."""
    negotiator_of(process_set, "broadcast")
    ranks = process_set.ranks or []
    if root_rank not in ranks:
        raise ValueError(
            f"broadcast received invalid root rank {root_rank} for provided process set; use one of {ranks}"
        )
    return ranks.index(root_rank)


def _reduction(average: bool | None, op: ReduceOp | int | None) -> ReduceOp:
    if average is not None:
        if op is not None:
            raise ValueError("The op parameter supersedes average, got both; pass op only")
        warnings.warn("Parameter `average` has been replaced with `op`", DeprecationWarning, stacklevel=4)
        return Average if average else Sum
    reduction = Average if op is None else parse_op(op)
    if reduction is ReduceOp.ADASUM:
        raise ValueError("op: adasum is not elementwise and not available here, got Adasum; use Average or Sum")
    return reduction
