"""Device arrays of every library as CuPy arrays, and the devices that hold them."""

from __future__ import annotations

from typing import Any, cast

import numpy as np

from mpitrain.errors import UnavailableError
from mpitrain.memory.device.library import CupyArray, explained, load_cupy

__all__ = [
    "as_cupy",
    "copy",
    "describe_devices",
    "device_id",
    "device_of",
    "empty",
    "is_device_array",
    "is_read_only",
]


def is_device_array(array: object) -> bool:
    """Tell whether `array` exposes device memory (`__cuda_array_interface__`)."""
    # The type is asked first: on a CuPy array the property would build its whole description.
    return hasattr(type(array), "__cuda_array_interface__") or hasattr(array, "__cuda_array_interface__")


def is_read_only(array: object) -> bool:
    """Tell whether the exporter of `array` forbids writes to it."""
    return bool(cast("Any", array).__cuda_array_interface__["data"][1])


def as_cupy(array: object, *, name: str = "array") -> CupyArray:
    """Return a CuPy array over the memory of `array`, without a copy.

    Args:
        array: CuPy array, or anything with `__cuda_array_interface__`; kept alive by the result.
        name: What messages call it.

    Raises:
        UnavailableError: CuPy is not installed.
    """
    cupy = load_cupy(name)
    if isinstance(array, cupy.ndarray):
        return array
    with explained(name):
        return cupy.asarray(array)


def device_id(array: CupyArray) -> int:
    """Return the number of the device that holds a CuPy array."""
    return int(array.device.id)


def describe_devices() -> str:
    """Return CuPy's version and the names of the devices that it sees.

    Raises:
        UnavailableError: CuPy is not installed, or sees no device.
    """
    cupy = load_cupy("devices")
    runtime = cupy.cuda.runtime
    with explained("devices"):
        names = [runtime.getDeviceProperties(index)["name"].decode() for index in range(runtime.getDeviceCount())]
    return f"{cupy.__version__}, {', '.join(names) or 'no device'}"


def empty(shape: tuple[int, ...], storage: np.dtype[Any], device: int) -> CupyArray:
    """Return a new uninitialised CuPy array on `device`.

    Raises:
        MemoryError: The device has no room for it.
    """
    cupy = load_cupy("empty")
    with cupy.cuda.Device(device), explained("empty"):
        return cupy.empty(shape, dtype=storage)


def copy(array: CupyArray) -> CupyArray:
    """Return a new C-contiguous CuPy array with the contents of `array`, on its device.

    Raises:
        MemoryError: The device has no room for it.
    """
    cupy = load_cupy("copy")
    with cupy.cuda.Device(device_id(array)), explained("copy"):
        return cupy.array(array, order="C", copy=True)


def device_of(local_rank: int) -> int:
    """Return the number of the device that a rank uses, among those that its process sees.

    Ranks of a node take the devices in turn, so that several share one where there are fewer devices than ranks. A
    launcher that shows each rank devices of its own (CUDA_VISIBLE_DEVICES) has its way, as these are what is counted.

    Raises:
        UnavailableError: CuPy is not installed, or sees no device.
    """
    cupy = load_cupy("devices")
    with explained("devices"):
        count = cupy.cuda.runtime.getDeviceCount()
    if not count:
        raise UnavailableError("devices: this process sees none, got 0; look at CUDA_VISIBLE_DEVICES and at nvidia-smi")
    return local_rank % int(count)
