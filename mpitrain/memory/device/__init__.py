"""Device memory, seen through CuPy. The only package that imports CuPy, and only when it is needed.

So far device arrays are recognised, described, allocated and waited for; no collective
runs on them yet.
"""

from __future__ import annotations

from mpitrain.memory.device.arrays import (
    as_cupy,
    copy,
    describe_devices,
    device_id,
    empty,
    is_device_array,
    is_read_only,
    synchronize,
)

__all__ = [
    "as_cupy",
    "copy",
    "describe_devices",
    "device_id",
    "empty",
    "is_device_array",
    "is_read_only",
    "synchronize",
]
