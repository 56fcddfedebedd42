"""Integer handles, as Horovod gives them out."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

from mpitrain.collectives import Handle

__all__ = ["forget", "poll", "register", "synchronize"]

_handles: dict[int, tuple[Handle[list[Any]], Callable[[list[Any]], Any]]] = {}
_numbers = itertools.count()


def register(handle: Handle[list[Any]], finish: Callable[[list[Any]], Any]) -> int:
    """Give an operation in flight a number.

    Args:
        handle: Of the operation.
        finish: Makes what `synchronize` returns from the operation's results.
    """
    number = next(_numbers)
    _handles[number] = (handle, finish)
    return number


def forget(handle: int) -> None:
    """Give back the number of an operation whose result nobody will ask for; an unknown one is none's any more."""
    _handles.pop(handle, None)


def poll(handle: int) -> bool:
    """Whether an asynchronous operation has ended, so that `synchronize` would not wait.

    Raises:
        ValueError: No operation in flight has this handle.
    """
    if handle not in _handles:
        raise ValueError(f"handle: unknown, got {handle!r}; it was synchronized before or never given out")
    return _handles[handle][0].done


def synchronize(handle: int) -> Any:
    """Wait for an asynchronous operation and return its result; None for an unknown handle, as in Horovod.

    Raises:
        HorovodInternalError: The operation failed.
    """
    if handle not in _handles:
        return None
    operation, finish = _handles[handle]
    try:
        results = operation.wait()
    finally:
        # An interrupt may have ended the waiting only.
        if operation.done:
            del _handles[handle]
    return finish(results)
