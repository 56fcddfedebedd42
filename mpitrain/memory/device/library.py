"""CuPy itself. Loaded here and nowhere else, and only when a device array is passed or a device asked for."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
from collections.abc import Iterator
from typing import Any, TypeAlias

from mpitrain.errors import UnavailableError

__all__ = ["CupyArray", "CupyModule", "explained", "is_installed", "load_cupy"]

CupyModule: TypeAlias = Any
CupyArray: TypeAlias = Any

# Of the CUDA runtime, as in its driver_types.h.
_OUT_OF_MEMORY = 2
_DRIVER_TOO_OLD = 35
_NO_DRIVER_OR_DEVICE = {
    3: "start CUDA before the process forks, or fork with the start method spawn",
    34: "the installed driver is a stub; install NVIDIA's driver",
    46: "the devices are busy or in exclusive mode; let ranks share one with nvidia-smi -c DEFAULT",
    100: "look at nvidia-smi and at CUDA_VISIBLE_DEVICES, and run containers with access to the devices",
    101: "it is no number of a device; look at CUDA_VISIBLE_DEVICES and at torch.cuda.device_count()",
    802: "the devices are not set up yet; look at nvidia-smi and at the fabric manager",
    803: "the driver does not fit its own kernel module; restart the machine, or install the driver again",
    804: "this CuPy needs a newer driver; install the CuPy of the driver's CUDA version",
    999: "the driver cannot start; look at nvidia-smi",
}
_CUPY_OF_DRIVER = "cupy-cuda12x for CUDA 12, cupy-cuda13x for CUDA 13"


def is_installed() -> bool:
    """Whether CuPy is installed; it is not loaded for that."""
    return importlib.util.find_spec("cupy") is not None


def load_cupy(subject: str) -> CupyModule:
    """Return the module `cupy`.

    Args:
        subject: What needs it, as messages say.

    Raises:
        UnavailableError: CuPy is not installed, or cannot be loaded.
    """
    try:
        return importlib.import_module("cupy")
    except ImportError as error:
        if "libcuda" in str(error):
            raise UnavailableError(
                f"{subject}: device arrays need NVIDIA's driver, got {error}; "
                f"run on a machine with the driver (see nvidia-smi), or pass a host array"
            ) from error
        raise UnavailableError(
            f"{subject}: device arrays need CuPy, got {error}; "
            f"install cupy-cuda12x or cupy-cuda13x, or pass a host array"
        ) from error


@contextlib.contextmanager
def explained(subject: str) -> Iterator[None]:
    """Turn what CuPy raises within into an error of ours with a remedy.

    Raises:
        UnavailableError: No driver, no device, or a CuPy for another version of CUDA.
        MemoryError: The device has no room.
    """
    cupy = load_cupy(subject)
    runtime = cupy.cuda.runtime
    try:
        yield
    except cupy.cuda.memory.OutOfMemoryError as error:
        raise MemoryError(_no_room(cupy, subject, error)) from error
    except runtime.CUDARuntimeError as error:
        if error.status == _OUT_OF_MEMORY:
            raise MemoryError(_no_room(cupy, subject, error)) from error
        if error.status == _DRIVER_TOO_OLD:
            raise UnavailableError(_other_version(cupy, subject, error)) from error
        if error.status not in _NO_DRIVER_OR_DEVICE:
            raise
        raise UnavailableError(
            f"{subject}: no device can be used, got {error}; {_NO_DRIVER_OR_DEVICE[error.status]}"
        ) from error


def _no_room(cupy: CupyModule, subject: str, error: Exception) -> str:
    pool = cupy.get_default_memory_pool()
    kept = f"CuPy's pool keeps {pool.free_bytes() / 2**20:.0f} MiB that it does not use"
    return (
        f"{subject}: out of memory on the device, got {str(error).rstrip('.')} ({kept}); "
        f"use smaller buckets or batches, or fewer ranks per device"
    )


def _other_version(cupy: CupyModule, subject: str, error: Exception) -> str:
    runtime = cupy.cuda.runtime
    needs, has = (_version(number) for number in (runtime.runtimeGetVersion(), runtime.driverGetVersion()))
    what = "the machine has no driver" if has == "0.0" else f"the driver is for CUDA {has}"
    return (
        f"{subject}: CuPy {cupy.__version__} needs CUDA {needs} and {what}, got {error}; "
        f"update the driver, or install the CuPy that fits it: {_CUPY_OF_DRIVER}"
    )


def _version(number: int) -> str:
    """Write CUDA's 12040 as 12.4."""
    return f"{number // 1000}.{number % 1000 // 10}"
