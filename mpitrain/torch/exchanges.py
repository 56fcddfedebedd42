"""Operations that move tensors by name and reduce nothing, with Horovod's names and arguments.

See `reductions` for how names match.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from mpitrain.torch.handles import synchronize
from mpitrain.torch.starting import only_result, start_named
from mpitrain.torch.world import ProcessSet, global_process_set, negotiator_of

__all__ = [
    "allgather",
    "allgather_async",
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


def allgather_async(tensor: Tensor, name: str | None = None, process_set: ProcessSet = global_process_set) -> int:
    """Start an `allgather`; returns a handle."""
    return start_named("allgather", [tensor], name, process_set, only_result)


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
    return start_named("broadcast", [tensor], name, process_set, only_result, root=root_of(root_rank, process_set))


def broadcast_async_(
    tensor: Tensor, root_rank: int, name: str | None = None, process_set: ProcessSet = global_process_set
) -> int:
    """Start a `broadcast_`; returns a handle."""
    root = root_of(root_rank, process_set)
    return start_named("broadcast", [tensor], name, process_set, only_result, root=root, in_place=True)


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


def barrier(process_set: ProcessSet = global_process_set) -> None:
    """Return when all ranks have called."""
    synchronize(start_named("barrier", [], "barrier", process_set, lambda _results: None))


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

    return start_named("alltoall", [tensor], name, process_set, finish, splits=rows)


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
