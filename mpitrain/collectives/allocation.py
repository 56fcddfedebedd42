"""Arrays in memory that the ranks of a node share, and the private ones that stand for them."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

from mpitrain.collectives.context import Context
from mpitrain.collectives.plan import Plan, empty_plan
from mpitrain.errors import CollectiveError, UnavailableError
from mpitrain.memory import DType, Place, SharedArray, SharedBlock, as_dtype

__all__ = ["allocate", "plan_allocation"]

_log = logging.getLogger("mpitrain")


def plan_allocation(_context: Context, shape: int | Sequence[int], dtype: Any) -> Plan[None]:
    """Prepare nothing but the check of the arguments, which are the same on all ranks.

    Raises:
        ValueError, TypeError: Bad argument.
    """
    lengths = _lengths_of(shape)
    return empty_plan(f"allocation of {as_dtype(dtype)} {list(lengths)}")


def allocate(context: Context, shape: int | Sequence[int], dtype: Any) -> SharedArray:
    """Allocate an array of zeros, shared on all nodes or private on all ranks; every rank must call.

    Raises:
        MemoryError: This rank has no memory left for a private array.
        CollectiveError: Another one has not.
    """
    lengths, kind = _lengths_of(shape), as_dtype(dtype)
    node, transport = context.node, context.transport
    if node is not None:
        count = math.prod(lengths)
        block, problem = _try_to_share(context, count * kind.itemsize)
        answers = transport.gather_everywhere((problem, 0 if block is None else block.serial))
        problems = [text for text, _ in answers if text]
        if not problems and block is not None:
            # The number of one rank, by which all know the array.
            place = Place(context.sharers, answers[0][1], 0)
            return SharedArray(kind, lengths, block.typed(kind.storage, 0, count), node.rank, place)
        if context.rank == 0:
            _log.warning("%s; going on with private memory and messages, which is slower", problems[0])
    return _allocate_private(context, lengths, kind)


def _try_to_share(context: Context, nbytes: int) -> tuple[SharedBlock | None, str]:
    assert context.node is not None
    try:
        # A block of no bytes is not to be had.
        return context.node.allocate(max(1, nbytes)), ""
    except UnavailableError as error:
        return None, str(error)


def _allocate_private(context: Context, shape: tuple[int, ...], dtype: DType) -> SharedArray:
    try:
        array = SharedArray.private(dtype, shape)
    except MemoryError as error:
        context.transport.gather_everywhere(str(error))
        raise
    for rank, problem in enumerate(context.transport.gather_everywhere("")):
        if problem:
            raise CollectiveError(f"allocation of {dtype} {list(shape)}: rank {rank} has no memory left: {problem}")
    return array


def _lengths_of(shape: int | Sequence[int]) -> tuple[int, ...]:
    lengths = (shape,) if isinstance(shape, int) else tuple(shape)
    if not all(isinstance(length, int) for length in lengths):
        raise TypeError(f"shape: must be whole numbers, got {shape!r}; convert them")
    if any(length < 0 for length in lengths):
        raise ValueError(f"shape: must not be negative, got {shape!r}; use numbers from 0 on")
    return lengths
