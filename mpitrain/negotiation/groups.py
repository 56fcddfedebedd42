"""All-gather and reduce-scatter of several arrays as one operation: small ones share one buffer.

A buffer costs two copies and saves an operation, so it pays for arrays that take less time than starting does.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from mpitrain.collectives import Communicator, Handle, Task
from mpitrain.collectives.layout import even_counts
from mpitrain.memory import FlatArray, allocate_like, copy_of, flat_view
from mpitrain.negotiation.announcement import Announcement
from mpitrain.negotiation.scaling import check_reduction, op_to_run, scale_input, scale_result

__all__ = ["all_results", "run_allgather", "run_reduce_scatter"]

# Of a whole array: gathered, or before it is scattered.
_SMALL_NBYTES = 1 << 18


def all_results(parts: Sequence[Handle[Any]]) -> Task[list[Any]]:
    """Return the task that waits for operations and returns their results."""
    while not all(part.done for part in parts):
        yield False
    return [part.wait() for part in parts]


def run_allgather(comm: Communicator, arrays: Sequence[Any], rows: Sequence[Sequence[int]]) -> Task[list[Any]]:
    """Return the task that all-gathers several arrays; its result has pairs of what came and rows by source.

    Args:
        comm: The group.
        arrays: Of this rank; an array without dimensions is one row.
        rows: For each array, its first dimension on every rank.
    """
    small = [index for index, array in enumerate(arrays) if _gathered_nbytes(array, rows[index]) <= _SMALL_NBYTES]
    fused = set(small) if len(small) > 1 else set()
    alone = [index for index in range(len(arrays)) if index not in fused]
    parts = [comm.allgather_async(_with_rows(arrays[index]), rows=rows[index]) for index in alone]
    if fused:
        data = np.concatenate([flat_view(arrays[index]).bytes() for index in small])
        parts.append(comm.allgather_async(data, rows=_segments(arrays, rows, small, comm.size)))
    return _finish_allgather(parts, arrays, rows, alone, sorted(fused))


def _finish_allgather(
    parts: Sequence[Handle[Any]],
    arrays: Sequence[Any],
    rows: Sequence[Sequence[int]],
    alone: Sequence[int],
    fused: Sequence[int],
) -> Task[list[Any]]:
    gathered = yield from all_results(parts)
    results = dict(zip(alone, gathered, strict=False))
    if fused:
        # It has the segments of the ranks one after another, and each of these a part of every array.
        results |= {index: allocate_like(arrays[index], _gathered_shape(arrays[index], rows[index])) for index in fused}
        targets = [flat_view(results[index], writable=True).bytes() for index in fused]
        begins = [0] * len(fused)
        begin = 0
        for source in range(len(rows[0])):
            for position, index in enumerate(fused):
                nbytes = rows[index][source] * _row_nbytes(arrays[index])
                place = begins[position]
                targets[position][place : place + nbytes] = gathered[-1][begin : begin + nbytes]
                begins[position] += nbytes
                begin += nbytes
    return [(results[index], list(rows[index])) for index in range(len(arrays))]


def _segments(arrays: Sequence[Any], rows: Sequence[Sequence[int]], fused: Sequence[int], size: int) -> list[int]:
    return [sum(rows[index][rank] * _row_nbytes(arrays[index]) for index in fused) for rank in range(size)]


def _gathered_shape(array: Any, rows: Sequence[int]) -> tuple[int, ...]:
    return (sum(rows), *array.shape[1:])


def _gathered_nbytes(array: Any, rows: Sequence[int]) -> int:
    return sum(rows) * _row_nbytes(array)


def _row_nbytes(array: Any) -> int:
    nbytes: int = flat_view(array).dtype.itemsize * math.prod(array.shape[1:])
    return nbytes


def _with_rows(array: Any) -> Any:
    return array if array.shape else dataclasses.replace(flat_view(array), shape=(1,))


def run_reduce_scatter(comm: Communicator, announcement: Announcement, arrays: Sequence[Any]) -> Task[list[Any]]:
    """Return the task that reduce-scatters several arrays; its result has this rank's part of each.

    Raises:
        TypeError: The reduction is not defined for a dtype.
        ValueError: An array without dimensions.
    """
    views = [flat_view(array) for array in arrays]
    for view in views:
        check_reduction(announcement, view)
        if not view.shape:
            raise ValueError("reduce_scatter: needs a dimension to cut along, got shape (); reshape the array")
    groups: list[list[int]] = []
    by_dtype: dict[str, list[int]] = {}
    for index, view in enumerate(views):
        members = by_dtype.setdefault(view.dtype.name, []) if view.nbytes <= _SMALL_NBYTES else []
        if not members:
            groups.append(members)
        members.append(index)
    parts = []
    for members in groups:
        source = arrays[members[0]]
        if len(members) > 1:
            source = _side_by_side([views[index] for index in members], comm.size)
        elif announcement.prescale != 1.0:
            source = copy_of(source)
        view = flat_view(source)
        scale_input(view.data, view.dtype, announcement.prescale)
        parts.append(comm.reduce_scatter_async(source, op=op_to_run(announcement.op)))
    return _finish_reduce_scatter(comm, announcement, arrays, groups, parts)


def _finish_reduce_scatter(
    comm: Communicator,
    announcement: Announcement,
    arrays: Sequence[Any],
    groups: Sequence[Sequence[int]],
    parts: Sequence[Handle[Any]],
) -> Task[list[Any]]:
    reduced = yield from all_results(parts)
    results: dict[int, Any] = {}
    for members, result in zip(groups, reduced, strict=True):
        # The result of a buffer knows how elements are stored, not what they are.
        dtype = flat_view(arrays[members[0]]).dtype
        part = dataclasses.replace(flat_view(result, writable=True), dtype=dtype)
        scale_result(part.data, part.dtype, announcement.op, announcement.postscale, comm.size)
        if len(members) == 1:
            results[members[0]] = result
            continue
        begin = 0
        for index in members:
            rows = even_counts(arrays[index].shape[0], comm.size)
            results[index] = allocate_like(arrays[index], (rows[comm.rank], *arrays[index].shape[1:]))
            target = flat_view(results[index], writable=True)
            target.data[:] = part.data[begin : begin + target.count]
            begin += rows[0] * math.prod(arrays[index].shape[1:])
    return [results[index] for index in range(len(arrays))]


def _side_by_side(views: Sequence[FlatArray], size: int) -> FlatArray:
    """Return an array with a row per rank that holds the parts which that rank gets of all arrays.

    Parts take the room of the longest one, that of rank 0.
    """
    rows = [even_counts(view.shape[0], size) for view in views]
    row_counts = [math.prod(view.shape[1:]) for view in views]
    width = sum(each[0] * row_count for each, row_count in zip(rows, row_counts, strict=True))
    data = np.zeros((size, width), views[0].dtype.storage)
    column = 0
    for view, each, row_count in zip(views, rows, row_counts, strict=True):
        ends = itertools.accumulate(row * row_count for row in each)
        for rank, end in enumerate(ends):
            count = each[rank] * row_count
            data[rank, column : column + count] = view.data[end - count : end]
        column += each[0] * row_count
    return FlatArray(data.reshape(-1), views[0].dtype, (size, width), "cpu", data)
