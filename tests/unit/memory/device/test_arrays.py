"""Device dispatch on a machine without a device: host memory behind `__cuda_array_interface__`."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from mpitrain.errors import UnavailableError
from mpitrain.memory import allocate_like, copy_of, device, flat_view


class FakeDeviceArray:
    """What another library exports: an address, and nothing CuPy knows."""

    def __init__(self, host, *, read_only=False):
        self.host = host
        self.read_only = read_only

    @property
    def __cuda_array_interface__(self):
        description = dict(self.host.__array_interface__, version=3)
        description["data"] = (description["data"][0], self.read_only)
        return description


class FakeCupyArray(FakeDeviceArray):
    device = SimpleNamespace(id=3)

    def __getattr__(self, name):
        return getattr(self.host, name)

    def reshape(self, *shape):
        return FakeCupyArray(self.host.reshape(*shape))

    def view(self, dtype):
        return FakeCupyArray(self.host.view(dtype))


def exported_memory(array):
    description = {**array.__cuda_array_interface__, "version": 3}
    return np.asarray(SimpleNamespace(__array_interface__=description, keep=array))


@pytest.fixture
def cupy(monkeypatch):
    """Install a fake CuPy that keeps a record of devices entered and streams waited for."""
    module = ModuleType("cupy")
    module.record = []

    class Device:
        def __init__(self, number):
            self.number = number

        def __enter__(self):
            module.record.append(f"device {self.number}")

        def __exit__(self, *_):
            module.record.append("leave")

    module.ndarray = FakeCupyArray
    module.asarray = lambda array: FakeCupyArray(exported_memory(array))
    module.empty = lambda shape, dtype: FakeCupyArray(np.empty(shape, dtype))
    module.array = lambda array, order, copy: FakeCupyArray(np.array(array.host, order=order, copy=copy))
    stream = SimpleNamespace(synchronize=lambda: module.record.append("synchronize"))
    module.cuda = SimpleNamespace(Device=Device, get_current_stream=lambda: stream)
    monkeypatch.setitem(sys.modules, "cupy", module)
    return module


@pytest.mark.parametrize("kind", [FakeDeviceArray, FakeCupyArray])
def test_view_of_device_array_shares_memory(cupy, kind):
    array = kind(np.arange(6, dtype=np.float32).reshape(2, 3))
    flat = flat_view(array, writable=True)
    assert (flat.dtype.name, flat.shape, flat.device, flat.is_host) == ("float32", (2, 3), "cuda:3", False)
    assert flat.owner is array
    assert type(flat.data) is FakeCupyArray
    assert (flat.count, flat.nbytes, flat.bytes().size) == (6, 24, 24)
    flat.data.host[:] = 5
    assert array.host.tolist() == [[5, 5, 5], [5, 5, 5]]


def test_cupy_array_is_not_wrapped_again(cupy):
    array = FakeCupyArray(np.ones(3))
    assert device.as_cupy(array) is array


def test_interface_on_the_instance_is_seen(cupy):
    host = np.arange(3)
    array = SimpleNamespace(__cuda_array_interface__=FakeDeviceArray(host).__cuda_array_interface__)
    assert flat_view(array).data.host.tolist() == [0, 1, 2]


def test_view_refuses_what_it_refuses_on_the_host(cupy):
    with pytest.raises(ValueError, match=r"^grad: must be contiguous, got strides \(16,\); pass a contiguous copy"):
        flat_view(FakeDeviceArray(np.ones(4)[::2]), name="grad")
    with pytest.raises(TypeError, match=r"^grad: unsupported dtype, got dtype.'>f4'.*; use one of"):
        flat_view(FakeDeviceArray(np.ones(4, ">f4")), name="grad")
    read_only = FakeDeviceArray(np.ones(4), read_only=True)
    with pytest.raises(ValueError, match=r"^grad: must be writable, got a read-only array"):
        flat_view(read_only, name="grad", writable=True)
    assert flat_view(read_only).count == 4


def test_allocation_and_copy_stay_on_the_device(cupy):
    array = FakeDeviceArray(np.arange(6, dtype=np.int16).reshape(2, 3).T)
    new = allocate_like(array, (2, 2))
    assert (type(new), new.shape, new.dtype) == (FakeCupyArray, (2, 2), np.int16)
    same = copy_of(array)
    assert same.host.tolist() == array.host.tolist()
    assert same.host.flags.c_contiguous
    assert not np.shares_memory(same.host, array.host)
    assert cupy.record == ["device 3", "leave", "device 3", "leave"]


def test_synchronize_waits_on_the_device_of_the_array(cupy):
    device.synchronize(FakeDeviceArray(np.ones(3)))
    assert cupy.record == ["device 3", "synchronize", "leave"]


def test_synchronize_asks_torch_about_its_tensors(cupy, monkeypatch):
    waits = []

    class Tensor:
        def __init__(self, name):
            self.device, self.is_cuda = name, name != "cpu"

    stream_of = lambda name: SimpleNamespace(synchronize=lambda: waits.append(name))  # noqa: E731
    torch = SimpleNamespace(Tensor=Tensor, cuda=SimpleNamespace(current_stream=stream_of))
    monkeypatch.setattr(device.arrays, "loaded_torch", lambda: torch)
    for name in ("cpu", "cuda:1"):
        device.synchronize(Tensor(name))
    assert waits == ["cuda:1"]
    assert cupy.record == []


def test_synchronize_of_host_arrays_needs_no_cupy(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    device.synchronize(np.ones(3))


@pytest.mark.parametrize("function", [flat_view, copy_of, lambda array: allocate_like(array, 2), device.synchronize])
def test_missing_cupy_is_reported_with_the_remedy(monkeypatch, function):
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(UnavailableError, match=r"^array: device arrays need CuPy, got .*; install cupy-cuda12x"):
        function(FakeDeviceArray(np.ones(3)))
