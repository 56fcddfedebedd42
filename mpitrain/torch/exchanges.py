"""Broadcast, all-to-all and barrier by name, with Horovod's names and arguments.

See `reductions` for how names match. Gradients are pulled back as Horovod does: those of a broadcast are averaged over
the ranks for the root, and zero elsewhere; those of an all-to-all are sent back where the rows came from. What is
asynchronous or in place is outside autograd.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from mpitrain.torch.gradients import PullBack, carry_gradients
from mpitrain.torch.handles import synchronize
from mpitrain.torch.reductions import grouped_allreduce
from mpitrain.torch.starting import Operation, only_result
from mpitrain.torch.world import ProcessSet, global_process_set, negotiator_of

__all__ = [
    "alltoall",
    "alltoall_async",
    "barrier",
    "broadcast",
    "broadcast_",
    "broadcast_async",
    "broadcast_async_",
    "root_of",
]

Tensor = torch.Tensor


def broadcast_async(
    tensor: Tensor, root_rank: int, name: str | None = None, process_set: ProcessSet = global_process_set
) -> int:
    """Start a `broadcast`; returns a handle."""
    with Operation("broadcast", name, process_set) as operation:
        return operation.start([tensor], only_result, root=root_of(root_rank, process_set))


def broadcast_async_(
    tensor: Tensor, root_rank: int, name: str | None = None, process_set: ProcessSet = global_process_set
) -> int:
    """Start a `broadcast_`; returns a handle."""
    with Operation("broadcast", name, process_set) as operation:
        return operation.start([tensor], only_result, root=root_of(root_rank, process_set), in_place=True)


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
        ValueError: Root out of range, bad argument, or a name in flight.
    """
    with Operation("broadcast", name, process_set) as operation:
        root = root_of(root_rank, process_set)

        def run() -> tuple[Sequence[Tensor], PullBack]:
            return synchronize(operation.start([tensor], list, root=root)), pull_back

        def pull_back(gradients: list[Tensor], other_name: str) -> list[Tensor]:
            averages = grouped_allreduce(gradients, name=other_name, process_set=process_set)
            is_other = torch.tensor(operation.negotiator.comm.rank != root)
            # Not new zeros: a backward pass of this one must reach the operation on every rank.
            return [average.masked_fill(is_other, 0.0) for average in averages]

        (result,) = carry_gradients(operation, [tensor], run)
        return result


def broadcast_(
    tensor: Tensor, root_rank: int, name: str | None = None, process_set: ProcessSet = global_process_set
) -> Tensor:
    """Copy the root's tensor into those of all other ranks; see `broadcast`."""
    with Operation("broadcast", name, process_set) as operation:
        root = root_of(root_rank, process_set)
        return synchronize(operation.start([tensor], only_result, root=root, in_place=True))  # type: ignore[no-any-return]


def alltoall_async(
    tensor: Tensor,
    splits: Tensor | Sequence[int] | None = None,
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
) -> int:
    """Start an `alltoall`; returns a handle. `synchronize` always returns the pair with the received splits."""
    with Operation("alltoall", name, process_set) as operation:
        return _start_alltoall(operation, tensor, splits, lambda pairs: pairs[0])


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
    with Operation("alltoall", name, process_set) as operation:

        def run() -> tuple[Sequence[Tensor], PullBack]:
            output, received = synchronize(_start_alltoall(operation, tensor, splits, only_result))
            row_count = tensor.shape[0]

            def pull_back(gradients: list[Tensor], other_name: str) -> list[Tensor]:
                (gradient,) = gradients
                returned, _ = alltoall(gradient, received, other_name, process_set)
                unsent = row_count - returned.shape[0]
                return [torch.cat([returned, returned.new_zeros(unsent, *returned.shape[1:])]) if unsent else returned]

            return (output, received), pull_back

        output, received = carry_gradients(operation, [tensor], run)
        return output if splits is None else (output, received)


def barrier(process_set: ProcessSet = global_process_set) -> None:
    """Return when all ranks have called."""
    with Operation("barrier", "barrier", process_set) as operation:
        synchronize(operation.start([], lambda _results: None))


def _start_alltoall(
    operation: Operation,
    tensor: Tensor,
    splits: Tensor | Sequence[int] | None,
    finish: Callable[[list[tuple[Tensor, Tensor]]], Any],
) -> int:
    rows = _split_rows(tensor, splits, operation.negotiator.comm.size)
    device = splits.device if isinstance(splits, torch.Tensor) else None

    def with_splits(pairs: list[tuple[Tensor, list[int]]]) -> Any:
        return finish(
            [(output, torch.tensor(received, dtype=torch.int32, device=device)) for output, received in pairs]
        )

    return operation.start([tensor], with_splits, splits=rows)


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
