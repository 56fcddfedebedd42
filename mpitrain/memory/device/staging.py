"""Pinned host memory, and device arrays that have an image in it.

A device copies to and from pinned memory by itself, while the host does other things; MPI that is not CUDA-aware
sees only the image. It is copied in pieces, each with an event of its own, so that what has arrived is on its way to
other ranks while the rest is still being copied.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections import deque
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpitrain.memory.device.library import CupyArray, CupyModule, load_cupy
from mpitrain.memory.device.streams import Event, Stream, is_done, streams_of
from mpitrain.memory.dtypes import DType
from mpitrain.memory.scratch import ScratchPool
from mpitrain.memory.shared import SharedArray

__all__ = ["Image", "PinnedArray", "pinned_pool"]

# Pinned memory cannot be swapped out, so less of it is kept for later than of other memory.
_MOST_IDLE_NBYTES = 256 << 20


def pinned_pool() -> ScratchPool:
    """Return this process's pool of pinned memory.

    Raises:
        UnavailableError: CuPy is not installed.
    """
    return _pool(load_cupy("pinned memory"))


@functools.cache
def _pool(cupy: CupyModule) -> ScratchPool:
    def allocate(nbytes: int) -> NDArray[np.uint8]:
        # Not from CuPy's own pool, which rounds up to powers of two.
        try:
            pointer = cupy.cuda.PinnedMemoryPointer(cupy.cuda.PinnedMemory(nbytes), 0)
        except cupy.cuda.runtime.CUDARuntimeError as error:
            raise MemoryError(
                f"pinned memory: the host cannot pin {nbytes / 2**20:.1f} MiB, got {error}; "
                f"reduce smaller arrays at a time, or free memory of the host"
            ) from error
        return np.frombuffer(pointer, np.uint8, nbytes)

    return ScratchPool(_MOST_IDLE_NBYTES, allocate)


class PinnedArray(SharedArray):
    """An array of any dtype in pinned memory, which only this rank has.

    Args:
        dtype: Element type.
        shape: Of the array; its contents are undefined at first.
    """

    def __init__(self, dtype: DType, shape: tuple[int, ...]) -> None:
        memory = pinned_pool().lend(math.prod(shape) * dtype.itemsize)
        super().__init__(dtype, shape, [memory.view(dtype.storage)], 0, None)

    def new(self, shape: tuple[int, ...]) -> PinnedArray:
        return PinnedArray(self.dtype, shape)


class Image:
    """What an array on a device looks like on the host, copied piece by piece in either direction.

    One run at a time. The array on the device must outlive the copies; `is_settled` tells when.

    Args:
        host: The image; its shape may differ from the array's, not its number of elements.
        array: The flat array on the device, in storage dtype.
        piece_nbytes: Size of one copy.
    """

    def __init__(self, host: PinnedArray, array: CupyArray, piece_nbytes: int) -> None:
        self.host = host
        self._array = array
        self._cupy = load_cupy("staging")
        self._streams = streams_of(int(array.data.device_id))
        self._piece_count = max(1, piece_nbytes // host.dtype.itemsize)
        self._arriving: deque[tuple[int, Event]] = deque()
        self._num_arrived = host.flat.size
        self._last_up: Event | None = None

    @property
    def piece_count(self) -> int:
        """Elements of a piece; the last one may have fewer."""
        return self._piece_count

    def begin(self, ready: Event, *, reads: bool) -> None:
        """Begin a run.

        Args:
            ready: From then on the array on the device may be read and written.
            reads: Whether the image is to hold what the array does; else nothing has to arrive.
        """
        self._streams.up.wait_event(ready)
        self._last_up = None
        count = self.host.flat.size
        self._num_arrived = 0 if reads else count
        if not reads:
            return
        self._streams.down.wait_event(ready)
        for first in range(0, count, self._piece_count):
            last = min(first + self._piece_count, count)
            self._copy(first, last, self._cupy.cuda.runtime.memcpyDeviceToHost, self._streams.down)
            self._arriving.append((last, self._streams.record(self._streams.down)))

    @property
    def num_arrived(self) -> int:
        """How many elements of the image, from the first on, hold what the array does."""
        while self._arriving and is_done(self._arriving[0][1]):
            self._num_arrived, _ = self._arriving.popleft()
        return self._num_arrived

    @property
    def has_arrived(self) -> bool:
        """Whether the whole image has."""
        return self.num_arrived == self.host.flat.size

    def give(self, first: int, last: int) -> None:
        """Copy elements `first` to `last` of the image, which do not change any more, to the array."""
        if last > first:
            self._copy(first, last, self._cupy.cuda.runtime.memcpyHostToDevice, self._streams.up)
            self._last_up = self._streams.record(self._streams.up)

    @property
    def is_settled(self) -> bool:
        """Whether nothing is being copied."""
        return self.has_arrived and (self._last_up is None or is_done(self._last_up))

    def __del__(self) -> None:
        # Of a run that has failed; the memory must not be used for anything else before.
        with contextlib.suppress(Exception):
            for event in [*(event for _, event in self._arriving), self._last_up]:
                if event is not None:
                    event.synchronize()

    def _copy(self, first: int, last: int, kind: int, stream: Stream) -> None:
        host, itemsize = self.host.flat, self.host.dtype.itemsize
        there = int(self._array.data.ptr) + first * itemsize
        here = _address(host) + first * itemsize
        to_host = kind == self._cupy.cuda.runtime.memcpyDeviceToHost
        dest, source = (here, there) if to_host else (there, here)
        self._cupy.cuda.runtime.memcpyAsync(dest, source, (last - first) * itemsize, kind, stream.ptr)


def _address(array: NDArray[Any]) -> int:
    return int(array.__array_interface__["data"][0])
