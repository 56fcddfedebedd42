"""What goes wrong with CuPy, the driver and the device: one message each, with the remedy."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from mpitrain.errors import UnavailableError
from mpitrain.memory.device import describe_devices, empty, explained, library, load_cupy


def test_driver_that_is_missing(monkeypatch):
    def fail(name):
        raise ImportError("libcuda.so.1: cannot open shared object file: No such file or directory")

    monkeypatch.setattr(library, "importlib", type("Stub", (), {"import_module": staticmethod(fail)}))
    with pytest.raises(UnavailableError, match=r"^grad: device arrays need NVIDIA's driver, got libcuda.*; run on"):
        load_cupy("grad")


@pytest.mark.parametrize(
    ("needs", "has", "words"),
    [
        (13000, 12080, r"needs CUDA 13\.0 and the driver is for CUDA 12\.8, got .*; update the driver, or install"),
        (12090, 0, r"needs CUDA 12\.9 and the machine has no driver, got .*cupy-cuda12x for CUDA 12"),
    ],
)
def test_version_of_cuda_that_does_not_fit(fake_cupy, monkeypatch, needs, has, words):
    runtime = fake_cupy.cuda.runtime
    monkeypatch.setattr(runtime, "runtimeGetVersion", lambda: needs)
    monkeypatch.setattr(runtime, "driverGetVersion", lambda: has)

    def fail():
        raise runtime.CUDARuntimeError(35)

    monkeypatch.setattr(runtime, "getDeviceCount", fail)
    with pytest.raises(UnavailableError, match=rf"^devices: CuPy {fake_cupy.__version__.split('+')[0]}.* {words}"):
        describe_devices()


def test_device_out_of_memory(fake_cupy):
    with pytest.raises(
        MemoryError, match=r"^empty: out of memory on the device, got .*MiB that it does not use.*; use"
    ):
        empty((1 << 40,), np.dtype(np.uint8), 0)
    words = r"^grad: out of memory on the device, got .*cudaErrorMemoryAllocation"
    with pytest.raises(MemoryError, match=words), explained("grad"):
        raise fake_cupy.cuda.runtime.CUDARuntimeError(2)


def test_other_errors_of_cuda_are_passed_on(fake_cupy):
    with pytest.raises(fake_cupy.cuda.runtime.CUDARuntimeError), explained("grad"):
        raise fake_cupy.cuda.runtime.CUDARuntimeError(700)


def test_other_missing_modules_are_missing_cupy(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(UnavailableError, match=r"^grad: device arrays need CuPy, got .*; install cupy-cuda12x"):
        load_cupy("grad")
