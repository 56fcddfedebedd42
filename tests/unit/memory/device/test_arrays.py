"""Device arrays as CuPy arrays, and which device a rank uses, on the stand-in for CuPy."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import numpy as np
import pytest

from mpitrain.errors import UnavailableError
from mpitrain.memory import allocate_like, copy_of, device, flat_view
from tests.support.fake_cupy import stand_in


class Exported:
    """What another library shows of an array: an address, and nothing CuPy knows."""

    def __init__(self, array, *, read_only=False):
        self.array = array
        self.read_only = read_only

    @property
    def __cuda_array_interface__(self):
        description = dict(self.array.__cuda_array_interface__)
        description["data"] = (description["data"][0], self.read_only)
        return description


@pytest.mark.parametrize("kind", [Exported, lambda array: array])
def test_view_of_device_array_shares_memory(fake_cupy, kind):
    array = kind(fake_cupy.arange(6, dtype=np.float32).reshape(2, 3))
    flat = flat_view(array, writable=True)
    assert (flat.dtype.name, flat.shape, flat.device, flat.is_host) == ("float32", (2, 3), "cuda:0", False)
    assert flat.owner is array
    assert type(flat.data) is fake_cupy.ndarray
    assert (flat.count, flat.nbytes, flat.bytes().size) == (6, 24, 24)
    flat.data[1:] = 5
    assert fake_cupy.asarray(array).tolist() == [[0, 5, 5], [5, 5, 5]]


def test_cupy_array_is_not_wrapped_again(fake_cupy):
    array = fake_cupy.ones(3)
    assert device.as_cupy(array) is array


def test_interface_on_the_instance_is_seen(fake_cupy):
    held = fake_cupy.arange(3)
    array = SimpleNamespace(__cuda_array_interface__=held.__cuda_array_interface__)
    assert flat_view(array).data.tolist() == [0, 1, 2]


def test_view_refuses_what_it_refuses_on_the_host(fake_cupy):
    with pytest.raises(ValueError, match=r"^grad: must be contiguous, got strides \(16,\); pass a contiguous copy"):
        flat_view(Exported(fake_cupy.ones(4)[::2]), name="grad")
    with pytest.raises(TypeError, match=r"^grad: unsupported dtype, got dtype.'>f4'.*; use one of"):
        flat_view(Exported(fake_cupy.ones(4, ">f4")), name="grad")
    read_only = Exported(fake_cupy.ones(4), read_only=True)
    with pytest.raises(ValueError, match=r"^grad: must be writable, got a read-only array"):
        flat_view(read_only, name="grad", writable=True)
    assert flat_view(read_only).count == 4


def test_allocation_and_copy_stay_on_the_device():
    with stand_in(num_devices=2) as cupy:
        with cupy.cuda.Device(1):
            array = Exported(cupy.arange(6, dtype=np.int16).reshape(2, 3))
        new = allocate_like(array, (2, 2))
        assert (type(new), new.shape, new.dtype, new.data.device_id) == (cupy.ndarray, (2, 2), np.int16, 1)
        same = copy_of(array)
        assert same.data.device_id == 1
        with cupy.cuda.Device(1):
            assert same.tolist() == [[0, 1, 2], [3, 4, 5]]
        assert same.data.ptr != array.array.data.ptr


def test_ranks_take_devices_in_turn(monkeypatch):
    with stand_in(num_devices=3):
        assert [device.device_of(local_rank) for local_rank in range(7)] == [0, 1, 2, 0, 1, 2, 0]
        # A launcher that shows every rank one device of its own.
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2")
        assert [device.device_of(local_rank) for local_rank in range(3)] == [0, 0, 0]


def test_machine_without_device_is_reported_with_the_remedy(monkeypatch):
    with stand_in():
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        for function in (lambda: device.device_of(0), device.describe_devices):
            with pytest.raises(
                UnavailableError, match=r"^devices: no device can be used, got cudaErrorNoDevice.*; look"
            ):
                function()


@pytest.mark.parametrize("function", [flat_view, copy_of, lambda array: allocate_like(array, 2), device.produced])
def test_missing_cupy_is_reported_with_the_remedy(fake_cupy, monkeypatch, function):
    array = Exported(fake_cupy.ones(3))
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(UnavailableError, match=r"^array: device arrays need CuPy, got .*; install cupy-cuda12x"):
        function(array)
