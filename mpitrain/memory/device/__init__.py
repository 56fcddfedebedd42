"""Device memory, seen through CuPy. The only package that imports CuPy, and only when it is needed."""

from __future__ import annotations

from mpitrain.memory.device.arrays import (
    as_cupy,
    copy,
    describe_devices,
    device_id,
    device_of,
    empty,
    is_device_array,
    is_read_only,
)
from mpitrain.memory.device.ipc import DeviceBlock, Holdings, allocate_mapped_device, mapping_device_memory
from mpitrain.memory.device.library import CupyArray, explained, is_installed, load_cupy
from mpitrain.memory.device.staging import Image, PinnedArray, pinned_pool
from mpitrain.memory.device.streams import (
    CallersStream,
    Event,
    Stream,
    Streams,
    callers_stream,
    hand_over,
    is_done,
    produced,
    streams_of,
)

__all__ = [
    "CallersStream",
    "CupyArray",
    "DeviceBlock",
    "Event",
    "Holdings",
    "Image",
    "PinnedArray",
    "Stream",
    "Streams",
    "allocate_mapped_device",
    "as_cupy",
    "callers_stream",
    "copy",
    "describe_devices",
    "device_id",
    "device_of",
    "empty",
    "explained",
    "hand_over",
    "is_device_array",
    "is_done",
    "is_installed",
    "is_read_only",
    "load_cupy",
    "mapping_device_memory",
    "pinned_pool",
    "produced",
    "streams_of",
]
