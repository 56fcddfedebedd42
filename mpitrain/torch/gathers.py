"""All-gather of tensors by name, with Horovod's names and arguments.

See `reductions` for how names match. Gradients are pulled back as Horovod does: they are averaged over the ranks, and
each rank takes the part that it brought.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from mpitrain.torch.gradients import PullBack, carry_gradients, is_differentiable
from mpitrain.torch.handles import synchronize
from mpitrain.torch.reductions import grouped_allreduce
from mpitrain.torch.starting import Operation
from mpitrain.torch.world import ProcessSet, global_process_set

__all__ = [
    "allgather",
    "allgather_async",
    "gathered_tensors",
    "grouped_allgather",
    "grouped_allgather_async",
    "only_gathered",
]

Tensor = torch.Tensor


def only_gathered(pairs: list[tuple[Tensor, list[int]]]) -> Tensor:
    """Return the gathered tensor of an operation on one."""
    (result,) = gathered_tensors(pairs)
    return result


def gathered_tensors(pairs: list[tuple[Tensor, list[int]]]) -> tuple[Tensor, ...]:
    """Return the gathered tensors of an operation's results, which have the rows by source besides."""
    return tuple(result for result, _ in pairs)


def allgather_async(tensor: Tensor, name: str | None = None, process_set: ProcessSet = global_process_set) -> int:
    """Start an `allgather`; returns a handle."""
    with Operation("allgather", name, process_set) as operation:
        return operation.start([tensor], only_gathered)


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
    (result,) = grouped_allgather([tensor], name, process_set)
    return result


def grouped_allgather_async(
    tensors: Sequence[Tensor], name: str | None = None, process_set: ProcessSet = global_process_set
) -> int:
    """Start a `grouped_allgather`; returns one handle, of a tuple."""
    with Operation("allgather", name, process_set) as operation:
        return operation.start(tensors, gathered_tensors)


def grouped_allgather(
    tensors: Sequence[Tensor], name: str | None = None, process_set: ProcessSet = global_process_set
) -> list[Tensor]:
    """All-gather several tensors together, all or none; see `allgather`."""
    with Operation("allgather", name, process_set) as operation:

        def run() -> tuple[Sequence[Tensor], PullBack]:
            pairs: list[tuple[Tensor, list[int]]] = synchronize(operation.start(tensors, list))

            def pull_back(gradients: list[Tensor], other_name: str) -> list[Tensor]:
                averages = grouped_allreduce(gradients, name=other_name, process_set=process_set)
                return [
                    average[begin : begin + rows].reshape(shape)
                    for average, (begin, rows, shape) in zip(averages, places, strict=True)
                ]

            rank = operation.negotiator.comm.rank
            places: list[Any] = [
                (sum(rows[:rank]), rows[rank], tensor.shape)
                for tensor, (_, rows) in zip(tensors, pairs, strict=True)
                if is_differentiable(tensor)
            ]
            return [result for result, _ in pairs], pull_back

        return list(carry_gradients(operation, tensors, run))
