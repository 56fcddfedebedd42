"""Order between a caller's streams and ours: the stand-in works off queues late, so what is not ordered is wrong."""

from __future__ import annotations

import contextlib
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest

from mpitrain.memory.device import CallersStream, hand_over, is_done, produced, streams, streams_of
from mpitrain.memory.device.streams import idle_streams
from tests.support.fake_cupy import held_up, stand_in


def copy_down(cupy, array, host, stream):
    cupy.cuda.runtime.memcpyAsync(
        host.ctypes.data, array.data.ptr, array.nbytes, cupy.cuda.runtime.memcpyDeviceToHost, stream.ptr
    )


def pinned(cupy, count):
    return np.frombuffer(cupy.cuda.alloc_pinned_memory(8 * count), np.int64, count)


def test_streams_are_made_once_for_each_device():
    with stand_in(num_devices=2):
        assert streams_of(1) is streams_of(1)
        assert (streams_of(0).device, streams_of(1).device) == (0, 1)
        assert streams_of(1).down.device_id == 1
        pointers = {
            stream.ptr for each in (streams_of(0), streams_of(1)) for stream in (each.down, each.up, each.compute)
        }
        assert len(pointers) == 6


def test_streams_that_are_held_up_are_left_to_those_who_have_them(fake_cupy):
    before = streams_of(0)
    assert idle_streams(0) is before
    with held_up(fake_cupy, before.up):
        assert not before.are_idle
        assert streams_of(0) is before
        made = idle_streams(0)
        assert made is not before
        assert made.are_idle
        assert streams_of(0) is made
        # Who asks before anything is queued gets no others.
        assert idle_streams(0) is made
        assert not before.settle(0.05)
        began_s = time.monotonic()
        assert not before.settle(60.0)
        # Nor for the device, for which those that came since are not all.
        assert not made.settle_device(60.0)
        assert time.monotonic() - began_s < 10.0
    fake_cupy.cuda.Stream.null.synchronize()
    before.up.synchronize()
    assert before.settle(0.0)
    assert made.settle_device(0.0)
    assert streams_of(0) is made


def test_our_work_follows_what_the_caller_has_queued(fake_cupy):
    ours = streams_of(0)
    stream = fake_cupy.cuda.Stream(non_blocking=True)
    host = pinned(fake_cupy, 100)
    fake_cupy._machine.machine.hold(True)
    with stream:
        array = fake_cupy.zeros(100, np.int64)
        for _ in range(5):
            array += 1
        event = produced(array)
    assert not event.done
    ours.down.wait_event(event)
    copy_down(fake_cupy, array, host, ours.down)
    end = ours.record(ours.down)
    fake_cupy._machine.machine.hold(False)
    end.synchronize()
    assert event.done
    assert (host == 5).all()


def test_caller_is_ordered_after_our_work_without_waiting(fake_cupy):
    ours = streams_of(0)
    array = fake_cupy.zeros(100, np.int64)
    fake_cupy.cuda.Stream.null.synchronize()
    fake_cupy._machine.machine.hold(True)
    with ours.up:
        array += 7
    theirs = fake_cupy.cuda.Stream(non_blocking=True)
    with theirs:
        hand_over(array, ours.record(ours.up))
        copy = array + 1
    assert not theirs.done
    fake_cupy._machine.machine.hold(False)
    theirs.synchronize()
    with theirs:
        assert set(copy.tolist()) == {8}
    assert fake_cupy._machine.machine.num_device_synchronizes == 0


@pytest.mark.parametrize("number", [0, 1])
def test_torch_is_asked_for_the_stream_of_its_tensors(monkeypatch, number):
    with stand_in(num_devices=2) as cupy:
        with cupy.cuda.Device(number):
            stream = cupy.cuda.Stream(non_blocking=True)

        class Tensor:
            device = SimpleNamespace(index=number)

        asked = []

        def current_stream(of):
            asked.append(of)
            return SimpleNamespace(cuda_stream=stream.ptr)

        torch = SimpleNamespace(Tensor=Tensor, cuda=SimpleNamespace(current_stream=current_stream))
        monkeypatch.setattr(streams, "loaded_torch", lambda: torch)
        ran = []
        cupy._machine.machine.hold(True)
        stream.launch_host_func(ran.append, "theirs")
        event = produced(Tensor())
        assert not event.done
        hand_over(Tensor(), event)
        cupy._machine.machine.hold(False)
        event.synchronize()
        assert ran == ["theirs"]
        assert asked == [Tensor.device] * 2


def test_stream_of_a_caller_is_current_in_any_thread(fake_cupy):
    theirs = fake_cupy.cuda.Stream(non_blocking=True)
    with theirs:
        array = fake_cupy.zeros(3)
        caller = CallersStream(array)
    seen = []

    def body():
        with caller.current():
            seen.append(fake_cupy.cuda.get_current_stream().ptr)
        seen.append(fake_cupy.cuda.get_current_stream().ptr)

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert seen == [theirs.ptr, 0]
    assert caller.device == 0


def test_caller_is_taken_note_of_anew_at_every_call(fake_cupy):
    array = fake_cupy.zeros(3)
    fake_cupy.cuda.Stream.null.synchronize()
    caller = CallersStream(array)
    theirs = fake_cupy.cuda.Stream(non_blocking=True)
    fake_cupy._machine.machine.hold(True)
    with theirs:
        array += 1
        caller.enter()
    assert not caller.ready.done
    fake_cupy._machine.machine.hold(False)
    caller.ready.synchronize()
    with theirs:
        assert array.tolist() == [1, 1, 1]


def test_stream_of_torch_is_made_current_by_torch(fake_cupy, monkeypatch):
    entered = []
    stream = fake_cupy.cuda.Stream(non_blocking=True)
    of_torch = SimpleNamespace(cuda_stream=stream.ptr)

    class Tensor:
        device = SimpleNamespace(index=0)

    @contextlib.contextmanager
    def current(chosen):
        entered.append(chosen)
        yield

    cuda = SimpleNamespace(current_stream=lambda device: of_torch, stream=current)
    monkeypatch.setattr(streams, "loaded_torch", lambda: SimpleNamespace(Tensor=Tensor, cuda=cuda))
    caller = CallersStream(Tensor())
    with caller.current():
        assert entered == [of_torch]


def test_an_event_of_a_device_that_has_failed_is_an_error_and_no_endless_wait(fake_cupy):
    streams = streams_of(0)
    event = streams.record(streams.compute)
    fake_cupy._machine.machine._error = 700  # an access that is not allowed
    with pytest.raises(RuntimeError):
        is_done(event)
