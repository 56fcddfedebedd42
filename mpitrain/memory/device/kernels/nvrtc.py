"""NVRTC where it came as a wheel: with torch for CUDA, or by itself."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from pathlib import Path

from mpitrain.memory.device.library import CupyModule

__all__ = ["preload_nvrtc"]


@functools.cache
def preload_nvrtc(cupy: CupyModule) -> None:
    """Load NVRTC from a wheel, if the system's loader does not find it and a wheel is there.

    CuPy 13 asks the system only, and takes what the process has loaded already; later versions look for wheels
    themselves.
    """
    name = f"libnvrtc.so.{cupy.cuda.runtime.runtimeGetVersion() // 1000}"
    try:
        ctypes.CDLL(name)
    except OSError:
        spec = importlib.util.find_spec("nvidia")
        folders = [] if spec is None else spec.submodule_search_locations or []
        # nvidia/cuda_nvrtc/lib up to CUDA 12, nvidia/cu13/lib after it.
        for library in (path for folder in folders for path in Path(folder).glob(f"*/lib/{name}")):
            ctypes.CDLL(str(library))
            return
