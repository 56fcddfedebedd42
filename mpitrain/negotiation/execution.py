"""Runs what was decided: builds the collective of one or several named operations and shares out the result."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from mpitrain.collectives import Communicator, Handle, ProgressEngine, Task
from mpitrain.memory import FlatArray, allocate_like, copy_of, flat_view
from mpitrain.negotiation.announcement import Announcement, Decision
from mpitrain.negotiation.groups import all_results, run_allgather, run_reduce_scatter
from mpitrain.negotiation.joining import neutral_announcement, neutral_arrays
from mpitrain.negotiation.scaling import check_reduction, op_to_run, scale_input, scale_result
from mpitrain.observe import OperationTrace, Recorder

__all__ = ["Entry", "Results", "contiguous", "neutral_entries", "run_decision"]

Results: TypeAlias = list[Any]


@dataclasses.dataclass(slots=True, eq=False)
class Entry:
    """A named operation of this rank.

    Attributes:
        announcement: What was said about it.
        arrays: Its inputs, contiguous.
        in_place: Results replace the inputs (all-reduce and broadcast).
        handle: Gets the list of results; for an all-gather and an all-to-all each is a pair with the rows by source.
            Whoever runs the operation resolves it.
        since_s: When it was started, by the monotonic clock.
        trace: Records it; None if nobody wants to know.
    """

    announcement: Announcement
    arrays: list[Any]
    in_place: bool
    handle: Handle[Results]
    since_s: float
    trace: OperationTrace | None = None

    def observe(self, recorder: Recorder | None) -> None:
        """Record it from now on, while it is negotiated."""
        if recorder is not None:
            self.trace = recorder.operation(f"{self.announcement.name} named {self.announcement.collective}")
            self.trace.enter("negotiation")

    def enter(self, phase: str) -> None:
        """Record that a phase begins; "" is the end."""
        if self.trace is not None:
            self.trace.enter(phase)
            if not phase:
                self.trace.end()


def contiguous(array: Any) -> Any:
    """Return the array, or a copy if it is not contiguous."""
    is_contiguous = array.is_contiguous() if hasattr(array, "is_contiguous") else array.flags.c_contiguous
    return array if is_contiguous else copy_of(array)


def neutral_entries(decision: Decision, engine: ProgressEngine) -> list[Entry]:
    """Return the operations of a decision as a rank that has joined takes part in them; the results are dropped."""
    absent = [neutral_announcement(announcement) for announcement in decision.announced]
    now_s = time.monotonic()
    return [Entry(each, neutral_arrays(each), True, engine.promise(each.name), now_s) for each in absent]


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
        return _of_one(run_allgather(comm, entry.arrays, decision.rows))
    if collective == "alltoall":
        sent = decision.splits[comm.rank]
        received = [splits[comm.rank] for splits in decision.splits]
        return _run_each([comm.alltoall_async(array, splits=sent, received_splits=received) for array in entry.arrays])
    assert collective == "reduce_scatter"
    return _of_one(run_reduce_scatter(comm, entry.announcement, entry.arrays))


def _run_each(parts: Sequence[Handle[Any]]) -> Task[list[Results]]:
    results = yield from all_results(parts)
    return [results]


def _of_one(task: Task[Results]) -> Task[list[Results]]:
    results = yield from task
    return [results]


def _run_broadcast(comm: Communicator, entry: Entry) -> Task[list[Results]]:
    root = entry.announcement.root
    start = comm.broadcast_async_ if entry.in_place else comm.broadcast_async
    return _run_each([start(array, root=root) for array in entry.arrays])


def _run_allreduce(comm: Communicator, entries: Sequence[Entry]) -> Task[list[Results]]:
    """All-reduce every array of every entry; those of one dtype share one buffer."""
    announcement = entries[0].announcement
    inputs = [flat_view(array) for entry in entries for array in entry.arrays]
    by_dtype: dict[str, list[int]] = {}
    for index, view in enumerate(inputs):
        check_reduction(announcement, view)
        by_dtype.setdefault(view.dtype.name, []).append(index)
    results = [
        [array if entry.in_place else allocate_like(array, array.shape) for array in entry.arrays] for entry in entries
    ]
    outputs = [flat_view(result, writable=True) for part in results for result in part]
    parts = []
    buffers = []
    for indices in by_dtype.values():
        sources, targets = [inputs[index] for index in indices], [outputs[index] for index in indices]
        began_ns = time.monotonic_ns()
        buffer = _pack(sources, targets)
        if comm.engine.recorder is not None:
            comm.engine.recorder.add_step("pack", began_ns)
        scale_input(buffer.data, buffer.dtype, announcement.prescale)
        # A fused buffer is one array to elementwise reductions only.
        counts = [source.count for source in sources] if announcement.op == "adasum" else None
        parts.append(comm.allreduce_async_(buffer, op=op_to_run(announcement.op), parts=counts))
        buffers.append((buffer, targets))
    return _finish_allreduce(comm, announcement, results, parts, buffers)


def _finish_allreduce(
    comm: Communicator,
    announcement: Announcement,
    results: list[Results],
    parts: Sequence[Handle[Any]],
    buffers: Sequence[tuple[FlatArray, list[FlatArray]]],
) -> Task[list[Results]]:
    yield from all_results(parts)
    began_ns = time.monotonic_ns()
    for buffer, targets in buffers:
        scale_result(buffer.data, buffer.dtype, announcement.op, announcement.postscale, comm.size)
        _unpack(buffer, targets)
    if comm.engine.recorder is not None:
        comm.engine.recorder.add_step("unpack", began_ns)
    return results


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
