"""Runs what was decided: builds the collective of one or several named operations and shares out the result."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from mpitrain.collectives import Communicator, Handle, Task
from mpitrain.memory import (
    FlatArray,
    allocate_like,
    check_op,
    copy_of,
    divide_by,
    flat_view,
    parse_op,
    scale,
)
from mpitrain.negotiation.announcement import Announcement, Decision

__all__ = ["Entry", "Results", "run_decision"]

Results: TypeAlias = list[Any]


@dataclasses.dataclass(slots=True, eq=False)
class Entry:
    """A named operation of this rank.

    Attributes:
        announcement: What was said about it.
        arrays: Its inputs, contiguous.
        in_place: Results replace the inputs (all-reduce and broadcast).
        handle: Gets the list of results; for an all-to-all each is a pair with the received splits.
            Whoever runs the operation resolves it.
        since_s: When it was started, by the monotonic clock.
    """

    announcement: Announcement
    arrays: list[Any]
    in_place: bool
    handle: Handle[Results]
    since_s: float


def run_decision(comm: Communicator, decision: Decision, entries: Sequence[Entry]) -> Task[list[Results]]:
    """Return the task that runs the decided operation; its result has the results of each entry.

    The collectives of one decision take their places in the order of calls now, not when the task is advanced.
    """
    collective = entries[0].announcement.collective
    if collective == "allreduce":
        return _run_allreduce(comm, entries)
    (entry,) = entries
    if collective == "broadcast":
        return _run_broadcast(comm, entry)
    if collective == "barrier":
        return _run_each([comm.barrier_async()])
    if collective == "allgather":
        pairs = zip(entry.arrays, decision.rows, strict=True)
        return _run_each([comm.allgather_async(_with_rows(array), rows=rows) for array, rows in pairs])
    if collective == "alltoall":
        sent = decision.splits[comm.rank]
        received = [splits[comm.rank] for splits in decision.splits]
        return _run_each([comm.alltoall_async(array, splits=sent, received_splits=received) for array in entry.arrays])
    assert collective == "reduce_scatter"
    return _run_reduce_scatter(comm, entry)


def _run_each(parts: Sequence[Handle[Any]]) -> Task[list[Results]]:
    results = yield from _all(parts)
    return [results]


def _all(parts: Sequence[Handle[Any]]) -> Task[Results]:
    while not all(part.done for part in parts):
        yield False
    return [part.wait() for part in parts]


def _run_broadcast(comm: Communicator, entry: Entry) -> Task[list[Results]]:
    root = entry.announcement.root
    start = comm.broadcast_async_ if entry.in_place else comm.broadcast_async
    return _run_each([start(array, root=root) for array in entry.arrays])


def _run_reduce_scatter(comm: Communicator, entry: Entry) -> Task[list[Results]]:
    announcement = entry.announcement
    parts = []
    for array in entry.arrays:
        check_op(parse_op(announcement.op), flat_view(array).dtype)
        scaled = array
        if announcement.prescale != 1.0:
            scaled = copy_of(array)
            view = flat_view(scaled)
            scale(view.data, announcement.prescale, view.dtype)
        parts.append(comm.reduce_scatter_async(scaled, op=_op_of_sum(announcement)))
    return _finish_reduce_scatter(comm, announcement, parts)


def _finish_reduce_scatter(
    comm: Communicator, announcement: Announcement, parts: Sequence[Handle[Any]]
) -> Task[list[Results]]:
    results = yield from _all(parts)
    for result in results:
        _scale_result(flat_view(result), announcement, comm.size)
    return [results]


def _run_allreduce(comm: Communicator, entries: Sequence[Entry]) -> Task[list[Results]]:
    """All-reduce every array of every entry; those of one dtype share one buffer."""
    announcement = entries[0].announcement
    inputs = [flat_view(array) for entry in entries for array in entry.arrays]
    by_dtype: dict[str, list[int]] = {}
    for index, view in enumerate(inputs):
        # Before anything is started or changed: what has no meaning has none on any rank.
        check_op(parse_op(announcement.op), view.dtype)
        by_dtype.setdefault(view.dtype.name, []).append(index)
    results = [
        [array if entry.in_place else allocate_like(array, array.shape) for array in entry.arrays] for entry in entries
    ]
    outputs = [flat_view(result, writable=True) for part in results for result in part]
    parts = []
    buffers = []
    for indices in by_dtype.values():
        sources, targets = [inputs[index] for index in indices], [outputs[index] for index in indices]
        buffer = _pack(sources, targets)
        if announcement.prescale != 1.0:
            scale(buffer.data, announcement.prescale, buffer.dtype)
        # A fused buffer is one array to elementwise reductions only.
        counts = [source.count for source in sources] if announcement.op == "adasum" else None
        parts.append(comm.allreduce_async_(buffer, op=_op_of_sum(announcement), parts=counts))
        buffers.append((buffer, targets))
    return _finish_allreduce(comm, announcement, results, parts, buffers)


def _finish_allreduce(
    comm: Communicator,
    announcement: Announcement,
    results: list[Results],
    parts: Sequence[Handle[Any]],
    buffers: Sequence[tuple[FlatArray, list[FlatArray]]],
) -> Task[list[Results]]:
    yield from _all(parts)
    for buffer, targets in buffers:
        _scale_result(buffer, announcement, comm.size)
        _unpack(buffer, targets)
    return results


def _op_of_sum(announcement: Announcement) -> str:
    """Return the reduction to run: an average is a sum that is divided afterwards, together with the scaling."""
    return "sum" if announcement.op == "average" else announcement.op


def _scale_result(view: FlatArray, announcement: Announcement, size: int) -> None:
    """Divide an average and apply the factor for results, in one step: integers are truncated once."""
    if announcement.op == "average" and announcement.postscale == 1.0:
        divide_by(view.data, size, view.dtype)
    elif announcement.op == "average":
        scale(view.data, announcement.postscale / size, view.dtype)
    elif announcement.postscale != 1.0:
        scale(view.data, announcement.postscale, view.dtype)


def _pack(sources: list[FlatArray], targets: list[FlatArray]) -> FlatArray:
    """Return one buffer that holds all sources: the target itself if there is only one."""
    if len(sources) == 1:
        if targets[0].data is not sources[0].data:
            targets[0].data[:] = sources[0].data
        return targets[0]
    dtype = sources[0].dtype
    data: NDArray[Any] = np.concatenate([source.data for source in sources])
    return FlatArray(data, dtype, data.shape, "cpu", data)


def _unpack(buffer: FlatArray, targets: list[FlatArray]) -> None:
    if targets[0] is buffer:
        return
    offset = 0
    for target in targets:
        target.data[:] = buffer.data[offset : offset + target.count]
        offset += target.count


def _with_rows(array: Any) -> Any:
    """Give an array without dimensions one row."""
    return array if array.shape else array.reshape(1)
