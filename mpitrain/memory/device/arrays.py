"""Device arrays of every library as CuPy arrays, and the devices that hold them."""

from __future__ import annotations

from typing import Any, cast

import numpy as np

from mpitrain.errors import UnavailableError
from mpitrain.memory.device.library import CupyArray, load_cupy
from mpitrain.memory.loaded import loaded_torch

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
    try:
        names = [runtime.getDeviceProperties(index)["name"].decode() for index in range(runtime.getDeviceCount())]
    except runtime.CUDARuntimeError as error:
        raise UnavailableError(
            f"devices: CuPy {cupy.__version__} sees none, got {error}; look at the driver with nvidia-smi"
        ) from error
    return f"{cupy.__version__}, {', '.join(names) or 'no device'}"


def empty(shape: tuple[int, ...], storage: np.dtype[Any], device: int) -> CupyArray:
    """Return a new uninitialised CuPy array on `device`."""
    cupy = load_cupy("empty")
    with cupy.cuda.Device(device):
        return cupy.empty(shape, dtype=storage)


def copy(array: CupyArray) -> CupyArray:
    """Return a new C-contiguous CuPy array with the contents of `array`, on its device."""
    cupy = load_cupy("copy")
    with cupy.cuda.Device(device_id(array)):
        return cupy.array(array, order="C", copy=True)


def synchronize(array: object, *, name: str = "array") -> None:
    """Wait for the work queued before on the stream that writes `array`.

    MPI knows nothing of streams: what it reads must be in memory before the call. Torch and
    CuPy have current streams of their own, so the library that owns `array` is asked.

    Args:
        array: The caller's own array (the `owner` of a `FlatArray`); host arrays need no wait.
        name: What messages call it.
    """
    torch = loaded_torch()
    if torch is not None and isinstance(array, torch.Tensor):
        tensor = cast("Any", array)
        if tensor.is_cuda:
            torch.cuda.current_stream(tensor.device).synchronize()
    elif is_device_array(array):
        cupy = load_cupy(name)
        with cupy.cuda.Device(device_id(as_cupy(array, name=name))):
            cupy.cuda.get_current_stream().synchronize()
