"""Reusable scratch memory: blocks that are used for one collective and needed again by the next.

A fresh allocation of some megabytes costs more in page faults than many collectives cost in all.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
from numpy.typing import NDArray

__all__ = ["ScratchPool"]

# A cache line, and the widest vector register.
_ALIGNMENT = 64
_SMALLEST_NBYTES = 4096


def _ordinary(nbytes: int) -> NDArray[np.uint8]:
    return np.empty(nbytes, np.uint8)


def _size_class(nbytes: int) -> int:
    """Round up to one of four sizes per doubling, so that at most a fifth of a block is unused."""
    if nbytes <= _SMALLEST_NBYTES:
        return _SMALLEST_NBYTES
    step = 1 << ((nbytes - 1).bit_length() - 3)
    return -(-nbytes // step) * step


class ScratchPool:
    """Lends aligned blocks of bytes, and keeps those that came back. Any thread may call."""

    def __init__(
        self, max_idle_nbytes: int = 256 << 20, allocate: Callable[[int], NDArray[np.uint8]] = _ordinary
    ) -> None:
        """Make an empty pool.

        Args:
            max_idle_nbytes: Upper bound of the memory kept for later. Above it, what has been idle for
                longest is freed. Blocks on loan do not count.
            allocate: Returns new memory of so many bytes, which goes with the array; ordinary memory if not given.
        """
        if max_idle_nbytes < 0:
            raise ValueError(f"max_idle_nbytes: must not be negative, got {max_idle_nbytes}; use 0 to keep nothing")
        self._max_idle_nbytes = max_idle_nbytes
        self._allocate = allocate
        self._lock = threading.Lock()
        self._idle: list[NDArray[np.uint8]] = []  # longest idle first
        self._idle_nbytes = 0
        # Weak, so that a block that is dropped and never released is freed all the same.
        self._lent: WeakValueDictionary[int, NDArray[Any]] = WeakValueDictionary()
        # Garbage is collected at any moment, also while the lock is held: what comes back so waits here.
        self._returned: deque[NDArray[Any]] = deque()

    @property
    def idle_nbytes(self) -> int:
        """Memory kept for later, in bytes."""
        return self._idle_nbytes

    def acquire(self, nbytes: int) -> NDArray[np.uint8]:
        """Return `nbytes` uninitialised bytes, aligned to 64, that nobody else has.

        Raises:
            ValueError: `nbytes` is negative.
        """
        if nbytes < 0:
            raise ValueError(f"nbytes: must not be negative, got {nbytes}; pass a size in bytes")
        block_nbytes = _size_class(nbytes) + _ALIGNMENT
        with self._lock:
            self._take_returned()
            block = self._take_idle(block_nbytes)
            if block is None:
                block = self._allocate(block_nbytes)
            self._lent[id(block)] = block
        start = -block.__array_interface__["data"][0] % _ALIGNMENT
        return block[start : start + nbytes]

    def release(self, array: NDArray[Any]) -> None:
        """Take back what `acquire` returned, or any view of it; the caller must not touch it afterwards.

        Raises:
            ValueError: It is not on loan from this pool (any more).
        """
        block = array.base
        with self._lock:
            if block is None or self._lent.get(id(block)) is not block:
                raise ValueError(
                    f"array: is not on loan from this pool, got one of {array.nbytes} bytes; "
                    f"release what acquire returned, once"
                )
            self._take_back(block)

    def lend(self, nbytes: int) -> NDArray[np.uint8]:
        """Acquire bytes that come back by themselves, when the last array over them is gone."""
        array = self.acquire(max(1, nbytes))  # there is no array over the memory of an empty one
        assert array.base is not None
        # Views of the loan refer to it, and not to the block behind it, as there is no array in between.
        loan = np.frombuffer(array.data, np.uint8)
        weakref.finalize(loan, self._returned.append, array.base).atexit = False
        return loan[:nbytes]

    @contextmanager
    def borrow(self, nbytes: int) -> Iterator[NDArray[np.uint8]]:
        """Acquire `nbytes` bytes for the length of a `with` block."""
        array = self.acquire(nbytes)
        try:
            yield array
        finally:
            self.release(array)

    def clear(self) -> None:
        """Free what is idle."""
        with self._lock:
            self._take_returned()
            self._trim(0)

    def _take_returned(self) -> None:
        while self._returned:
            self._take_back(self._returned.popleft())

    def _take_back(self, block: NDArray[Any]) -> None:
        del self._lent[id(block)]
        self._idle.append(block)
        self._idle_nbytes += block.nbytes
        self._trim(self._max_idle_nbytes)

    def _take_idle(self, block_nbytes: int) -> NDArray[np.uint8] | None:
        # Newest first: it is the most likely to be in the cache still.
        for index in range(len(self._idle) - 1, -1, -1):
            if self._idle[index].nbytes == block_nbytes:
                self._idle_nbytes -= block_nbytes
                return self._idle.pop(index)
        return None

    def _trim(self, limit_nbytes: int) -> None:
        while self._idle_nbytes > limit_nbytes:
            self._idle_nbytes -= self._idle.pop(0).nbytes
