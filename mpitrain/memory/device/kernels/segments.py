"""Launches `pack_segments` and `unpack_segments`: many tensors and one flat bucket, in one launch."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpitrain.memory.device.kernels.loader import THREADS, TILE, Array, address_of, launch, num_blocks_for
from mpitrain.memory.device.kernels.variants import segment_variant
from mpitrain.memory.device.library import CupyModule, explained, load_cupy
from mpitrain.memory.device.streams import Event, Stream
from mpitrain.memory.dtypes import DType
from mpitrain.memory.twins import wide_dtype

__all__ = ["SegmentTable"]

# As in segments.cuh.
_SEGMENT = np.dtype(
    [
        ("address", np.uint64),
        ("offset", np.int64),
        ("count", np.int64),
        ("head", np.int64),
        ("first_tile", np.int64),
    ]
)


class SegmentTable:
    """Where tensors lie in a bucket: made once for a bucket, used in every step.

    The table of addresses is sent to the device when an address has changed since the launch before, which gradients of
    one training loop seldom do. Belongs to the current device, and to the stream of its first launch.

    Args:
        counts: Elements of each tensor.
        offsets: Where each begins in the bucket, in elements.
        tensor_dtype: Element type of the tensors, a float.
        bucket_dtype: Element type of the bucket, a float.

    Raises:
        TypeError: A type that is no floating-point type.
        ValueError: Not as many offsets as counts.
    """

    def __init__(
        self, counts: Sequence[int], offsets: Sequence[int], *, tensor_dtype: DType, bucket_dtype: DType
    ) -> None:
        if len(counts) != len(offsets):
            raise ValueError(f"offsets: must be one for each tensor, got {len(offsets)} for {len(counts)}; pass all")
        self._wide = wide_dtype(tensor_dtype, bucket_dtype)
        self._dtypes = tensor_dtype, bucket_dtype
        self._segments = np.zeros(len(counts), _SEGMENT)
        self._segments["count"] = counts
        self._segments["offset"] = offsets
        num_tiles = -(-self._segments["count"] // TILE)
        self._num_tiles = int(num_tiles.sum())
        self._segments["first_tile"] = np.cumsum(num_tiles) - num_tiles
        self._bucket = 0
        self._on_device: _DeviceCopy | None = None

    def pack(
        self, tensors: Sequence[Array], bucket: Array, *, scale: float = 1.0, stream: Stream | None = None
    ) -> None:
        """Copy all tensors, scaled and cast, into `bucket`: the twin of this name tells how.

        Args:
            tensors: First element of each, in the order of `counts`.
            bucket: First element of the bucket.
            scale: Factor.
            stream: Stream of the current device; CuPy's current one without. The same in every call.

        Raises:
            ValueError: Another number of tensors, or another stream than before.
            UnavailableError: The kernel cannot be compiled here.
        """
        self._launch("pack_segments", tensors, bucket, scale, stream)

    def unpack(
        self, tensors: Sequence[Array], bucket: Array, *, scale: float = 1.0, stream: Stream | None = None
    ) -> None:
        """Copy the contents of `bucket`, scaled and cast, to all tensors; with the arguments of `pack`."""
        self._launch("unpack_segments", tensors, bucket, scale, stream)

    def _launch(
        self, source: str, tensors: Sequence[Array], bucket: Array, scale: float, stream: Stream | None
    ) -> None:
        if len(tensors) != len(self._segments):
            raise ValueError(
                f"tensors: must be as many as in the table, {len(self._segments)}, got {len(tensors)}; pass all"
            )
        if self._num_tiles == 0:
            return
        cupy = load_cupy("kernels")
        stream = cupy.cuda.get_current_stream() if stream is None else stream
        with explained("kernels"):
            table = self._sent(cupy, [address_of(tensor) for tensor in tensors], address_of(bucket), stream)
        arguments = (
            table,
            np.int32(len(self._segments)),
            np.int64(self._num_tiles),
            address_of(bucket),
            self._wide.type(scale),
        )
        variant = segment_variant(source, *self._dtypes)
        launch(variant, source, num_blocks_for(self._num_tiles * THREADS), arguments, stream)

    def _sent(self, cupy: CupyModule, addresses: Sequence[int], bucket: int, stream: Stream) -> int:
        """Return the address of the table on the device, which has got these addresses."""
        new = np.array(addresses, np.uint64)
        if self._on_device is None:
            self._on_device = _DeviceCopy(cupy, self._segments.nbytes, stream)
        elif bucket == self._bucket and np.array_equal(new, self._segments["address"]):
            return self._on_device.address_for(stream)
        self._segments["address"] = new
        self._bucket = bucket
        self._segments["head"] = self._heads()
        return self._on_device.send(self._segments, stream)

    def _heads(self) -> NDArray[np.int64]:
        """Return the first elements from which on tensor and bucket are aligned, -1 where there is none."""
        sizes = [dtype.itemsize for dtype in self._dtypes]
        group_count = 16 // min(sizes)
        places = self._segments["address"], self._bucket + self._segments["offset"].astype(np.uint64) * sizes[1]
        heads = np.full(len(self._segments), -1, np.int64)
        for head in reversed(range(group_count)):
            misplaced = [(place + head * size) % min(16, group_count * size) for place, size in zip(places, sizes)]  # noqa: B905
            heads[(misplaced[0] == 0) & (misplaced[1] == 0)] = head
        return heads


class _DeviceCopy:
    """A few bytes that are sent to the device now and then, in the order of one stream."""

    def __init__(self, cupy: CupyModule, nbytes: int, stream: Stream) -> None:
        self._runtime = cupy.cuda.runtime
        self._stream = stream
        with stream:
            self._array = cupy.empty(nbytes, np.uint8)
        # Only from pinned memory the copy does not wait for the stream.
        self._pinned = cupy.cuda.alloc_pinned_memory(nbytes)
        self._sent: Event = cupy.cuda.Event(disable_timing=True)

    def __del__(self) -> None:
        # The next owner of the pinned memory must not change what is still to be read.
        with contextlib.suppress(Exception):
            self._sent.synchronize()

    def address_for(self, stream: Stream) -> int:
        if stream.ptr != self._stream.ptr:
            raise ValueError(
                f"stream: must be the one of the first launch, {self._stream.ptr:#x}, got {stream.ptr:#x}; "
                f"make a table for each stream"
            )
        return int(self._array.data.ptr)

    def send(self, contents: NDArray[Any], stream: Stream) -> int:
        address = self.address_for(stream)
        # The copy before may still be reading; an event that was never recorded is done.
        self._sent.synchronize()
        ctypes.memmove(self._pinned.ptr, contents.ctypes.data, contents.nbytes)
        to_device = self._runtime.memcpyHostToDevice
        self._runtime.memcpyAsync(address, self._pinned.ptr, contents.nbytes, to_device, stream.ptr)
        self._sent.record(stream)
        return address
