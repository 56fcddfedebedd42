"""Bound methods that are to be called as long as somebody else refers to their objects."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

__all__ = ["Listeners"]

Function = TypeVar("Function", bound=Callable[..., Any])


class Listeners(Generic[Function]):
    """Those of one occasion, in the order in which they came; any thread may use them.

    What has died is dropped when it is met, and when another one comes: there are never many more than live.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._references: list[weakref.WeakMethod[Function]] = []

    def __len__(self) -> int:
        """Return how many there are, of which some may have died."""
        return len(self._references)

    def append(self, reference: weakref.WeakMethod[Function]) -> None:
        """Add one."""
        self._living(reference)

    def __iter__(self) -> Iterator[Function]:
        """Return those that live, to be called; one that dies or comes meanwhile is not waited for."""
        return iter(self._living())

    def _living(self, *more: weakref.WeakMethod[Function]) -> list[Function]:
        with self._lock:
            pairs = [(each, function) for each in (*self._references, *more) if (function := each()) is not None]
            self._references = [reference for reference, _ in pairs]
        return [function for _, function in pairs]
