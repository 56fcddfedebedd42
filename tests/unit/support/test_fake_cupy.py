"""The stand-in for CuPy: as late as a device, as strict as CUDA, and like CuPy in what it shows."""

from __future__ import annotations

import contextlib
import inspect
import re
import subprocess
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from tests.support.fake_cupy import environment, stand_in

# What the stand-in has for its own purposes.
OWN = {"CudaError", "EventState", "Mapping", "Queue", "bytes_at", "machine", "pack_handle", "unpack_handle"}


@contextlib.contextmanager
def held(cupy):
    """Let the device do nothing meanwhile."""
    machine = cupy._machine.machine
    machine.hold(True)
    try:
        yield
    finally:
        machine.hold(False)


def test_work_is_done_in_order_of_its_stream_and_late(fake_cupy):
    array = fake_cupy.arange(10, dtype=np.float32)
    doubled = (array + 1) * 2
    doubled[3:5] -= 1
    assert doubled.get().tolist() == [2, 4, 6, 7, 9, 12, 14, 16, 18, 20]
    assert (float(array[3]), float(array.sum()), bool((array < 10).all())) == (3, 45, True)
    array.fill(7)
    assert array._host[0] == 0
    assert array.get().tolist() == [7] * 10


def test_streams_are_ordered_by_events_only(fake_cupy):
    fake_cupy._machine.machine.configuration.latency_s = 0  # the last one, which may run first, is due at once
    stream = fake_cupy.cuda.Stream(non_blocking=True)
    array = fake_cupy.zeros(4, np.float32)
    fake_cupy.cuda.Stream.null.synchronize()
    event = fake_cupy.cuda.Event()
    with held(fake_cupy):
        array.fill(1)
        event.record()
        with stream:
            unordered = array + 0
        stream.wait_event(event)
        with stream:
            ordered = array + 0
        assert not event.done
    assert unordered.get(stream=stream).tolist() == [0, 0, 0, 0]
    assert ordered.get(stream=stream).tolist() == [1, 1, 1, 1]
    assert event.done


def test_event_that_was_not_recorded_holds_nobody_up(fake_cupy):
    event = fake_cupy.cuda.Event(disable_timing=True)
    fake_cupy.cuda.Stream.null.wait_event(event)
    fake_cupy.cuda.Stream.null.synchronize()
    assert event.done


def test_default_stream_waits_for_blocking_streams(fake_cupy):
    stream = fake_cupy.cuda.Stream()
    with stream:
        array = fake_cupy.full(4, 3, np.int32)
    assert array.get(stream=fake_cupy.cuda.Stream.null).tolist() == [3, 3, 3, 3]


def test_copies_read_pinned_memory_late_and_ordinary_memory_at_once(fake_cupy):
    runtime, stream = fake_cupy.cuda.runtime, fake_cupy.cuda.Stream(non_blocking=True)
    pinned = fake_cupy.cuda.alloc_pinned_memory(16)
    late = np.frombuffer(pinned, np.float32, 4)
    at_once = np.ones(4, np.float32)
    late[:] = 1
    array, other = fake_cupy.empty(4, np.float32), fake_cupy.empty(4, np.float32)
    with held(fake_cupy):
        runtime.memcpyAsync(array.data.ptr, pinned.ptr, 16, runtime.memcpyHostToDevice, stream.ptr)
        runtime.memcpyAsync(other.data.ptr, at_once.ctypes.data, 16, runtime.memcpyHostToDevice, stream.ptr)
        late[:] = at_once[:] = 2
    stream.synchronize()
    assert array.get().tolist() == [2, 2, 2, 2]
    assert other.get().tolist() == [1, 1, 1, 1]


def test_pool_gives_out_parts_of_allocations_and_reuses_them_on_their_stream(fake_cupy):
    first, second = fake_cupy.zeros(4), fake_cupy.zeros(4)
    memory = fake_cupy._machine.machine.memory
    assert memory.find(first.data.ptr) is memory.find(second.data.ptr)
    address = second.data.ptr
    del second
    with fake_cupy.cuda.Stream():
        assert fake_cupy.empty(4).data.ptr != address
    assert fake_cupy.empty(4).data.ptr == address


def test_what_is_freed_and_what_is_too_much(fake_cupy):
    runtime = fake_cupy.cuda.runtime
    memory = fake_cupy.cuda.Memory(64)
    array = fake_cupy.ndarray(
        8, np.uint8, fake_cupy.cuda.MemoryPointer(fake_cupy.cuda.UnownedMemory(memory.ptr, 64, None), 0)
    )
    del memory
    assert array.get().tolist() == [0xDD] * 8
    with pytest.raises(runtime.CUDARuntimeError, match="cudaErrorInvalidValue"):
        runtime.free(array.data.ptr)
    with pytest.raises(fake_cupy.cuda.memory.OutOfMemoryError, match="Out of memory allocating"):
        fake_cupy.empty(1 << 40, np.uint8)


def test_arrays_of_other_libraries_are_seen_without_a_copy(fake_cupy):
    array = fake_cupy.arange(6, dtype=np.int16).reshape(2, 3)
    view = fake_cupy.asarray(SimpleNamespace(__cuda_array_interface__=array.T.__cuda_array_interface__, keep=array))
    assert (view.shape, view.strides) == ((3, 2), (2, 6))
    view[1] = 9
    assert array.get().tolist() == [[0, 9, 2], [3, 9, 5]]
    with pytest.raises(TypeError, match="Implicit conversion"):
        np.asarray(array)


def test_several_devices_have_memory_and_streams_of_their_own():
    with stand_in(num_devices=2) as cupy:
        with cupy.cuda.Device(1):
            array, stream = cupy.zeros(3), cupy.cuda.Stream()
        assert (array.device.id, stream.device_id, cupy.cuda.Device().id) == (1, 1, 0)
        event = cupy.cuda.Event()
        with pytest.raises(cupy.cuda.runtime.CUDARuntimeError, match="cudaErrorInvalidResourceHandle"):
            event.record(stream)
        with pytest.raises(cupy.cuda.runtime.CUDARuntimeError, match="cudaErrorInvalidDevice"):
            cupy.cuda.Device(2).use()


PEER = """
import numpy as np, sys, cupy
runtime = cupy.cuda.runtime
memory, event = (bytes.fromhex(text) for text in sys.argv[1:])
address, event = runtime.ipcOpenMemHandle(memory), runtime.ipcOpenEventHandle(event)
assert runtime.ipcOpenMemHandle(memory) == address
runtime.ipcCloseMemHandle(address)
owner = cupy.cuda.UnownedMemory(address, 16, None)
array = cupy.ndarray(4, np.float32, cupy.cuda.MemoryPointer(owner, 0))
print("ready", flush=True)
sys.stdin.readline()
runtime.streamWaitEvent(0, event)
array *= 2
print(array.get().tolist())
"""


def test_another_process_shares_memory_and_events(fake_cupy):
    cuda = fake_cupy.cuda
    array = fake_cupy.ndarray(4, np.float32, cuda.memory.MemoryPointer(cuda.Memory(16), 0))
    event = cuda.Event(disable_timing=True, interprocess=True)
    handles = [cuda.runtime.ipcGetMemHandle(array.data.ptr), cuda.runtime.ipcGetEventHandle(event.ptr)]
    assert [len(handle) for handle in handles] == [64, 64]
    with pytest.raises(cuda.runtime.CUDARuntimeError, match="cudaErrorDeviceUninitialized"):
        cuda.runtime.ipcOpenMemHandle(handles[0])
    command = [sys.executable, "-c", PEER, *(handle.hex() for handle in handles)]
    with subprocess.Popen(
        command, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "ready\n"
        with held(fake_cupy):
            array.fill(4)
            event.record()
            process.stdin.write("go\n")
            process.stdin.flush()
        assert process.stdout.readline() == "[8.0, 8.0, 8.0, 8.0]\n"
    assert array.get().tolist() == [8, 8, 8, 8]


def test_events_for_other_processes_have_no_times(fake_cupy):
    with pytest.raises(fake_cupy.cuda.runtime.CUDARuntimeError, match="cudaErrorInvalidValue"):
        fake_cupy.cuda.Event(interprocess=True)


def parameters_of(function):
    """Names of the parameters; from the first line of the description where there is no signature, as Cython's."""
    try:
        return [name for name in inspect.signature(function).parameters if name not in ("self", "cls")]
    except ValueError:
        match = re.search(r"\((.*?)\)(?: ->.*)?$", (function.__doc__ or "").strip().split("\n")[0])
        if match is None:
            return None
        parts = [part.split("=")[0].split()[-1].lstrip("*\\") for part in match[1].split(",") if part.strip()]
        return [name for name in parts if name not in ("self", "cls", "")]


def shown(module):
    """Pairs of a dotted name and what it names, for what a module of the stand-in shows."""
    for name, value in vars(module).items():
        if name.startswith("_") or name in OWN or isinstance(value, ModuleType):
            continue
        # A package shows what its modules make, a module what it makes itself.
        is_package = hasattr(module, "__path__")
        if not isinstance(value, int) and not is_package and value.__module__ != module.__name__:
            continue
        yield name, value
        if inspect.isclass(value) and value.__module__ != "numpy":
            for member, inner in vars(value).items():
                if not member.startswith("_"):
                    yield f"{name}.{member}", inner


def test_everything_it_shows_is_there_in_cupy_with_these_parameters():
    real = pytest.importorskip("cupy", reason="CuPy is not installed")
    with stand_in() as fake:
        everything = [
            (path, name, value, parameters_of(getattr(value, "__wrapped__", value)) if callable(value) else None)
            for path in ("", "cuda", "cuda.runtime", "cuda.memory", "cuda.stream", "cuda.device", "cuda.pinned_memory")
            for name, value in shown(resolve(fake, path))
        ]
    for path, name, value, names in everything:
        there = resolve(real, ".".join(filter(None, [path, name])))
        theirs = parameters_of(there) if callable(there) and names is not None else None
        # A class that C made may not tell. Parameters that CuPy has besides are nobody's concern.
        if theirs and names and "args" not in theirs:
            assert names == [each for each in theirs if each in names], f"{path}.{name}"
        if isinstance(value, int) and isinstance(there, int):
            assert value == there, f"{path}.{name}"


def resolve(module, path):
    for name in filter(None, path.split(".")):
        module = getattr(module, name)
    return module
