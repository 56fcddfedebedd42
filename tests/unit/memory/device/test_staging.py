"""Images of device arrays in pinned memory, on the stand-in for CuPy."""

from __future__ import annotations

import gc
import time

import numpy as np
import pytest

from mpitrain.memory import allocate_like, copy_of, dtype_named, flat_view
from mpitrain.memory.device import Image, PinnedArray, pinned_pool, produced
from tests.support.limits import HANG_S

FLOAT32 = dtype_named("float32")


def soon(is_so):
    limit_s = time.monotonic() + HANG_S
    while not is_so():
        assert time.monotonic() < limit_s
        time.sleep(0.0002)


def is_pinned(cupy, array):
    address = array.__array_interface__["data"][0]
    return cupy.cuda.runtime.pointerGetAttributes(address).type == cupy.cuda.runtime.memoryTypeHost


def test_pinned_arrays_make_pinned_arrays(fake_cupy):
    array = PinnedArray(dtype_named("bfloat16"), (3, 5))
    assert (array.flat.dtype, array.flat.size, array.shape, array.is_shared) == (np.uint16, 15, (3, 5), False)
    array.flat[:] = 7
    copy, new = copy_of(array), allocate_like(array, (4,))
    for each in (array, copy, new):
        assert type(each) is PinnedArray
        assert is_pinned(fake_cupy, each.flat)
        assert flat_view(each).dtype is array.dtype
    assert copy.flat.tolist() == [7] * 15
    assert flat_view(array).is_expendable
    assert not flat_view(np.ones(3)).is_expendable


def test_pinned_memory_is_used_again(fake_cupy):
    array = PinnedArray(FLOAT32, (10_000,))
    where = array.flat.__array_interface__["data"][0]
    view = array.flat[5:9]
    del array
    gc.collect()
    assert PinnedArray(FLOAT32, (10_000,)).flat.__array_interface__["data"][0] != where
    del view
    gc.collect()
    assert PinnedArray(FLOAT32, (10_000,)).flat.__array_interface__["data"][0] == where
    assert len(fake_cupy._machine.machine.pinned) == 2


def test_memory_that_cannot_be_pinned(fake_cupy, monkeypatch):
    def fail(size, flags):
        raise fake_cupy.cuda.runtime.CUDARuntimeError(2)

    monkeypatch.setattr(fake_cupy.cuda.runtime, "hostAlloc", fail)
    with pytest.raises(MemoryError, match=r"^pinned memory: the host cannot pin .* MiB, got cudaErrorMemory.*; reduce"):
        pinned_pool().acquire(1 << 20)


@pytest.mark.parametrize("count", [0, 1, 15, 16, 17, 100])
def test_image_there_and_back(fake_cupy, count):
    source = fake_cupy.arange(count, dtype=np.float32)
    target = fake_cupy.zeros(count, np.float32)
    image = Image(PinnedArray(FLOAT32, (count,)), source, 64)
    image.begin(produced(source), reads=True)
    soon(lambda: image.has_arrived)
    assert image.host.flat.tolist() == list(range(count))
    back = Image(image.host, target, 64)
    back.begin(produced(target), reads=False)
    assert back.has_arrived
    for first in range(0, count, 7):
        back.give(first, min(first + 7, count))
    soon(lambda: back.is_settled)
    assert target.tolist() == list(range(count))


def test_pieces_arrive_in_order(fake_cupy):
    machine = fake_cupy._machine.machine
    source = fake_cupy.arange(100, dtype=np.float32)
    image = Image(PinnedArray(FLOAT32, (100,)), source, 64)
    machine.hold(True)
    image.begin(produced(source), reads=True)
    assert image.num_arrived == 0
    assert not image.is_settled
    machine.hold(False)
    seen = []

    def look():
        seen.append(image.num_arrived)
        assert image.host.flat[: seen[-1]].tolist() == list(range(seen[-1]))
        return image.has_arrived

    soon(look)
    assert seen == sorted(seen)
    assert all(number % 16 == 0 or number == 100 for number in seen)


def test_memory_of_an_image_that_is_dropped_is_not_used_before_its_copies_end(fake_cupy):
    source = fake_cupy.full(1000, 5, np.float32)
    image = Image(PinnedArray(FLOAT32, (1000,)), source, 64)
    image.begin(produced(source), reads=True)
    del image  # waits
    gc.collect()
    other = PinnedArray(FLOAT32, (1000,))
    other.flat[:] = 1
    time.sleep(0.01)
    assert (other.flat == 1).all()
