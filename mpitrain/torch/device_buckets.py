"""Buckets in device memory, filled by one launch.

A gradient waits where it is until all of its bucket have come. They are then copied into the bucket, scaled and cast,
by one kernel that is queued on the stream of the backward pass: it runs after what has made them, nobody waits for it,
and their memory can be used again for whatever that stream does next. The reduction waits for that stream's event.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch

from mpitrain.collectives import PersistentPlan
from mpitrain.memory import SharedDeviceArray, as_dtype
from mpitrain.memory.device import callers_stream
from mpitrain.memory.device.kernels import SegmentTable
from mpitrain.torch.slots import Bucket, Slot

__all__ = ["DeviceBucket"]

Tensor = torch.Tensor


class DeviceBucket(Bucket):
    """A bucket in device memory.

    Args:
        position: Among the buckets.
        slots: Of the gradients, in the order in which they lie in the buffer.
        array: What the buffer lies in.
        plan: All-reduces the buffer.
    """

    __slots__ = ("_array", "_factor", "_streams", "_tables")

    def __init__(self, position: int, slots: list[Slot], array: SharedDeviceArray, plan: PersistentPlan) -> None:
        super().__init__(position, slots, array.tensor(), plan)
        self._array = array
        self._factor = 1.0
        # Those that gradients of this step were made on.
        self._streams: set[Any] = set()
        # For each stream, as they are sent to the device in its order.
        self._tables: dict[tuple[int, str], SegmentTable] = {}

    def take(self, slot: Slot, factor: float) -> None:
        """Note a gradient that has come, for `start` to move it."""
        self._factor = factor
        if slot.param.is_cuda:
            self._streams.add(torch.cuda.current_stream(slot.param.device))
        self.missing -= 1

    def start(self) -> None:
        """Move all gradients into the bucket, and start the reduction."""
        others = self._join()
        if not self._pack(others):
            for slot in self.slots:
                self._fill(slot, self._factor)
        super().start()

    def _join(self) -> list[Any]:
        """Have this thread's stream wait for the others that have made gradients; return it, if there were any."""
        streams, self._streams = self._streams, set()
        if not streams:
            return []
        current = torch.cuda.current_stream(self.slots[0].param.device)
        streams.discard(current)
        for stream in streams:
            current.wait_stream(stream)
        return [current] if streams else []

    def _pack(self, readers: list[Any]) -> bool:
        """Copy all gradients by one launch; whether that can be done.

        Args:
            readers: Streams that read gradients which others have made.
        """
        if not self._can_launch or any(slot.param.grad is None or slot.param.grad is slot.view for slot in self.slots):
            return False
        grads = [self.value_of(slot).contiguous() for slot in self.slots]
        self._launch("pack", grads, self._factor)
        for slot, grad in zip(self.slots, grads, strict=True):
            for stream in readers:
                # The allocator gives the memory out again on the stream that it was made on.
                grad.record_stream(stream)
            self.point_to(slot)
        return True

    def _results(self, factor: float) -> list[Tensor]:
        dtype = self.slots[0].param.dtype
        if not self._can_launch or dtype == self.buffer.dtype:
            return super()._results(factor)
        grads = [torch.empty(slot.param.shape, dtype=dtype, device=self.buffer.device) for slot in self.slots]
        self._launch("unpack", grads, factor)
        return grads

    @property
    def _can_launch(self) -> bool:
        """Whether the kernel knows the dtypes; where memory is shared, it has been seen to run."""
        dtypes = {slot.param.dtype for slot in self.slots}
        return (
            self._array.is_shared
            and len(dtypes) == 1
            and all(slot.param.device == self.buffer.device for slot in self.slots)
            and all(dtype.is_floating_point for dtype in (*dtypes, self.buffer.dtype))
        )

    def _launch(self, direction: str, grads: list[Tensor], factor: float) -> None:
        with callers_stream(self.buffer) as stream:
            # Gradients lie elsewhere than results, and addresses that do not change are sent once.
            key = (stream.ptr, direction)
            table = self._tables.get(key)
            if table is None:
                table = self._tables[key] = self._table()
            launch = table.pack if direction == "pack" else table.unpack
            launch([grad.data_ptr() for grad in grads], self.buffer.data_ptr(), scale=factor, stream=stream)

    def _table(self) -> SegmentTable:
        counts = [slot.param.numel() for slot in self.slots]
        offsets = [0, *itertools.accumulate(counts[:-1])]
        return SegmentTable(
            counts,
            offsets,
            tensor_dtype=as_dtype(self.slots[0].param.dtype),
            bucket_dtype=as_dtype(self.buffer.dtype),
        )
