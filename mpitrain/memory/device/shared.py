"""Arrays in device memory that the ranks of a node share."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from mpitrain.memory.device.arrays import device_id, empty
from mpitrain.memory.device.ipc import DeviceBlock
from mpitrain.memory.device.library import CupyArray, load_cupy
from mpitrain.memory.device.streams import Streams, hand_over, produced, streams_of
from mpitrain.memory.dtypes import DType
from mpitrain.memory.shared import NodeArray

__all__ = ["SharedDeviceArray"]


class SharedDeviceArray(NodeArray):
    """A `NodeArray` in the memory of devices: each rank's own lies on its own device.

    What works on it is queued on streams. Who hands it to a collective has queued all that writes it on the current
    stream of torch or CuPy; who reads it afterwards does so there, too.
    """

    block: DeviceBlock | None

    @classmethod
    def private(cls, dtype: DType, shape: tuple[int, ...], device: int) -> SharedDeviceArray:
        """Make an array of zeros that only this rank has.

        Raises:
            UnavailableError: CuPy is not installed.
            MemoryError: The device has no room for it.
        """
        flat = empty((math.prod(shape),), dtype.storage, device)
        cuda = load_cupy("array").cuda
        # On the stream that it was allocated on, where others may still be queued that used the memory before; and
        # whatever stream reads it first finds the zeros.
        with cuda.Device(device):
            flat.fill(0)
            cuda.get_current_stream().synchronize()
        return cls(dtype, shape, [flat], 0, None)

    @property
    def device_name(self) -> str:
        return f"cuda:{self.device}"

    def new(self, shape: tuple[int, ...]) -> SharedDeviceArray:
        return self.private(self.dtype, shape, self.device)

    def copy(self) -> SharedDeviceArray:
        made = self.new(self.shape)
        streams = streams_of(self.device)
        streams.compute.wait_event(produced(self))
        streams.copy(made.flat, self.flat, streams.compute)
        hand_over(made, streams.record(streams.compute))
        return made

    @property
    def streams(self) -> Streams:
        """On which collectives queue what they do with it; of memory that ranks share."""
        assert self.block is not None
        return self.block.streams

    @property
    def device(self) -> int:
        """Number of the device that holds this rank's elements."""
        return device_id(self.flat)

    def cupy(self) -> CupyArray:
        """Return this rank's array.

        Raises:
            TypeError: CuPy has no such dtype (bfloat16).
        """
        return self._shaped(self.flat)

    def tensor(self) -> Any:
        import torch

        # Torch reads no dtype of CuPy's that has other bits than it says.
        bits = self.flat if self.flat.dtype.name == self.dtype.name else self.flat.view(np.int16)
        flat = torch.as_tensor(bits, device=f"cuda:{self.device}")
        return flat.view(getattr(torch, self.dtype.name)).view(self.shape)
