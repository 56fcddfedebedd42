"""All-reduce of sparse tensors: what all ranks have is gathered, not added up in dense form."""

from __future__ import annotations

from collections.abc import Callable

import torch

from mpitrain.errors import CollectiveMismatchError
from mpitrain.memory import ReduceOp, parse_op
from mpitrain.torch.gathers import gathered_tensors
from mpitrain.torch.handles import synchronize
from mpitrain.torch.reductions import Average, Sum
from mpitrain.torch.starting import Operation
from mpitrain.torch.world import ProcessSet, global_process_set

__all__ = ["sparse_allreduce_async", "start_sparse_allreduce"]

Tensor = torch.Tensor


def sparse_allreduce_async(
    tensor: Tensor, name: str | None, op: ReduceOp, process_set: ProcessSet = global_process_set
) -> Callable[[], Tensor]:
    """Start the all-reduce of a sparse tensor, such as the gradient of an embedding.

    Each rank receives what all ranks have: bytes grow with their number, where a dense all-reduce would not.

    Args:
        tensor: In coordinate format, coalesced or not; shape and dtype the same on every rank.
        name: Same on every rank.
        op: `Average` or `Sum`.
        process_set: Whose ranks take part.

    Returns:
        A function that waits and returns a new sparse tensor; duplicate indices in it are to be added up.

    Raises:
        ValueError: Bad argument, or a name in flight. The function raises `HorovodInternalError` if ranks brought
            different things, or could not exchange messages; on every rank.
    """
    with Operation("allgather", name, process_set) as operation:
        return start_sparse_allreduce(operation, tensor, parse_op(op))


def start_sparse_allreduce(operation: Operation, tensor: Tensor, reduction: ReduceOp) -> Callable[[], Tensor]:
    """Start it as an all-gather; see `sparse_allreduce_async`."""
    if reduction not in (Average, Sum):
        raise ValueError(f"sparse_allreduce_async: op must be Average or Sum, got {reduction.name.lower()}")
    if tensor.layout is not torch.sparse_coo:
        raise ValueError(
            f"sparse_allreduce_async: must be in coordinate format, got layout {tensor.layout}; pass tensor.to_sparse()"
        )
    shape = torch.tensor([[*tensor.shape, tensor.sparse_dim()]])
    parts = [tensor._indices().T, tensor._values(), shape]  # noqa: SLF001  (the public ones want a coalesced tensor)
    # What is gathered has no reduction, but it must be the same on all ranks.
    handle = operation.start(parts, gathered_tensors, op=reduction.name.lower())
    size = operation.negotiator.comm.size

    def wait() -> Tensor:
        indices, values, shapes = synchronize(handle)
        if not bool((shapes == shape).all()):
            raise CollectiveMismatchError(
                "sparse_allreduce_async: Mismatched tensor shapes: ranks sent sparse tensors of shapes "
                f"{shapes[:, :-1].tolist()} with {shapes[:, -1].tolist()} sparse dimensions"
            )
        if reduction is Sum:
            return _sparse(indices.T, values, tensor.shape)
        if values.is_floating_point() or values.is_complex():
            return _sparse(indices.T, values / size, tensor.shape)
        # Of whole numbers it is the sum that is divided, and truncated as everywhere.
        total = _sparse(indices.T, values, tensor.shape).coalesce()
        return _sparse(total.indices(), torch.div(total.values(), size, rounding_mode="trunc"), tensor.shape)

    return wait


def _sparse(indices: Tensor, values: Tensor, shape: torch.Size) -> Tensor:
    # Made of parts of valid tensors, so there is nothing to check.
    return torch.sparse_coo_tensor(indices, values, shape, check_invariants=False)
