"""The CUDA runtime, as `cupy.cuda.runtime` shows it."""

from __future__ import annotations

import ctypes
import os
import threading

from cupy._machine import (
    CudaError,
    EventState,
    Mapping,
    Queue,
    bytes_at,
    machine,
    pack_handle,
    unpack_handle,
)

memcpyHostToHost, memcpyHostToDevice, memcpyDeviceToHost, memcpyDeviceToDevice, memcpyDefault = range(5)
eventDefault, eventBlockingSync, eventDisableTiming, eventInterprocess = 0, 1, 2, 4
streamDefault, streamNonBlocking = 0, 1
streamLegacy, streamPerThread = 1, 2
cudaIpcMemLazyEnablePeerAccess = 1
hostAllocDefault, hostAllocPortable = 0, 1
memoryTypeUnregistered, memoryTypeHost, memoryTypeDevice, memoryTypeManaged = range(4)
cudaDevAttrMultiProcessorCount = 16

_current = threading.local()
_NAMES = {
    1: "cudaErrorInvalidValue: invalid argument",
    2: "cudaErrorMemoryAllocation: out of memory",
    100: "cudaErrorNoDevice: no CUDA-capable device is detected",
    101: "cudaErrorInvalidDevice: invalid device ordinal",
    201: "cudaErrorDeviceUninitialized: invalid device context",
    217: "cudaErrorPeerAccessUnsupported: peer access is not supported between these two devices",
    400: "cudaErrorInvalidResourceHandle: invalid resource handle",
    600: "cudaErrorNotReady: device not ready",
    700: "cudaErrorIllegalAddress: an illegal memory access was encountered",
    801: "cudaErrorNotSupported: operation not supported",
}


class CUDARuntimeError(RuntimeError):
    def __init__(self, status):
        self.status = status
        super().__init__(_NAMES.get(status, f"cudaError {status}"))


def _translated(function):
    def call(*arguments, **options):
        try:
            return function(*arguments, **options)
        except CudaError as error:
            raise CUDARuntimeError(error.status) from None

    call.__name__ = function.__name__
    call.__wrapped__ = function
    return call


# Devices


@_translated
def getDeviceCount():
    count = len(machine.configuration.physical())
    if not count:
        raise CudaError(100)
    return count


@_translated
def getDevice():
    return getattr(_current, "device", 0)


@_translated
def setDevice(device):
    if not 0 <= device < len(machine.configuration.physical()):
        raise CudaError(101)
    _current.device = device


@_translated
def getDeviceProperties(device):
    if not 0 <= device < len(machine.configuration.physical()):
        raise CudaError(101)
    return {
        "name": b"Stand-in",
        "totalGlobalMem": machine.configuration.total_nbytes,
        "major": 9,
        "minor": 0,
        "multiProcessorCount": 4,
        "uuid": machine.configuration.physical()[device].to_bytes(16, "big"),
    }


@_translated
def deviceGetPCIBusId(device):
    return f"0000:{machine.configuration.physical()[device]:02X}:00.0"


@_translated
def deviceGetAttribute(attrib, device):
    return {cudaDevAttrMultiProcessorCount: 4}[attrib]


@_translated
def deviceCanAccessPeer(device, peerDevice):
    return int(device != peerDevice and machine.configuration.peer_access)


@_translated
def deviceEnablePeerAccess(peerDevice):
    if not machine.configuration.peer_access:
        raise CudaError(217)


@_translated
def deviceSynchronize():
    machine.num_device_synchronizes += 1
    queues = [queue for queue in list(machine.queues.values()) if queue.device == getDevice()]
    machine.synchronize(lambda: all(machine.is_idle(queue) for queue in queues))


@_translated
def driverGetVersion():
    return 13000


@_translated
def runtimeGetVersion():
    return 13000


@_translated
def memGetInfo():
    total_nbytes = machine.configuration.total_nbytes
    return total_nbytes - machine.memory.used_nbytes(getDevice()), total_nbytes


# Memory


@_translated
def malloc(size):
    return machine.memory.allocate(size, getDevice()).address


@_translated
def mallocAsync(size, stream):
    return machine.memory.allocate(size, getDevice(), is_exportable=False).address


@_translated
def free(ptr):
    if not ptr:
        return
    # As cudaFree does: nothing uses the memory any more.
    queues = list(machine.queues.values())
    machine.synchronize(lambda: all(machine.is_idle(queue) for queue in queues))
    machine.memory.free(ptr)


@_translated
def freeAsync(ptr, stream):
    machine.enqueue(machine.queue(stream, getDevice()), lambda: machine.memory.free(ptr))


@_translated
def hostAlloc(size, flags):
    mapping = Mapping.make(size)
    machine.pinned.append(mapping)
    return mapping.address


@_translated
def freeHost(ptr):
    kept = [mapping for mapping in machine.pinned if mapping.address != ptr]
    if len(kept) == len(machine.pinned):
        raise CudaError(1)
    machine.pinned[:] = kept


class PointerAttributes:
    def __init__(self, device, devicePointer, hostPointer, type):  # noqa: A002
        self.device = device
        self.devicePointer = devicePointer
        self.hostPointer = hostPointer
        self.type = type


@_translated
def pointerGetAttributes(ptr):
    allocation = machine.memory.find(ptr)
    if allocation is not None:
        return PointerAttributes(allocation.device, ptr, 0, memoryTypeDevice)
    if _is_pinned(ptr):
        return PointerAttributes(getDevice(), ptr, ptr, memoryTypeHost)
    return PointerAttributes(-1, 0, ptr, memoryTypeUnregistered)


def _is_pinned(ptr):
    return any(mapping.address <= ptr < mapping.address + mapping.nbytes for mapping in machine.pinned)


def _is_pageable(ptr):
    return machine.memory.find(ptr) is None and not _is_pinned(ptr)


def _check_extent(ptr, size):
    allocation = machine.memory.find(ptr)
    if allocation is not None and ptr + size > allocation.end:
        raise CudaError(1)


@_translated
def memcpyAsync(dst, src, size, kind, stream):
    _check_extent(dst, size)
    _check_extent(src, size)
    queue = machine.queue(stream, getDevice())
    if kind == memcpyHostToDevice and _is_pageable(src):
        # Ordinary memory is read before the call returns.
        taken = bytes_at(src, size).copy()
        machine.enqueue(queue, lambda: ctypes.memmove(dst, taken.ctypes.data, size))
        return
    machine.enqueue(queue, lambda: ctypes.memmove(dst, src, size))
    if kind == memcpyDeviceToHost and _is_pageable(dst):
        machine.synchronize(lambda: machine.is_idle(queue))


@_translated
def memcpyPeerAsync(dst, dstDevice, src, srcDevice, size, stream):
    memcpyAsync(dst, src, size, memcpyDeviceToDevice, stream)


@_translated
def memcpy(dst, src, size, kind):
    memcpyAsync(dst, src, size, kind, 0)
    if kind != memcpyDeviceToDevice:
        streamSynchronize(0)


@_translated
def memsetAsync(ptr, value, size, stream):
    _check_extent(ptr, size)
    machine.enqueue(machine.queue(stream, getDevice()), lambda: ctypes.memset(ptr, value, size))


# Streams


@_translated
def streamCreateWithFlags(flags):
    handle = machine.new_handle()
    machine.queues[handle] = Queue(getDevice(), is_non_blocking=bool(flags & streamNonBlocking))
    return handle


@_translated
def streamCreate():
    return streamCreateWithFlags(streamDefault)


@_translated
def streamDestroy(stream):
    # What was queued is still done; a queue that is empty costs nothing.
    machine.queue(stream, getDevice())


@_translated
def streamSynchronize(stream):
    queue = machine.queue(stream, getDevice())
    machine.synchronize(lambda: machine.is_idle(queue))


@_translated
def streamQuery(stream):
    if not machine.is_idle(machine.queue(stream, getDevice())):
        raise CudaError(600)


@_translated
def streamWaitEvent(stream, event, flags=0):
    state = _event(event)
    # What was recorded until now counts; an event that never was recorded holds nobody up.
    number = state.recorded
    queue = machine.queue(stream, getDevice())
    machine.enqueue(queue, lambda: None, is_ready=lambda: state.completed >= number)


@_translated
def launchHostFunc(stream, callback, arg):
    machine.enqueue(machine.queue(stream, getDevice()), lambda: callback(arg))


# Events


def _event(event):
    try:
        return machine.events[event]
    except KeyError:
        raise CudaError(400) from None


@_translated
def eventCreateWithFlags(flags):
    is_shared = bool(flags & eventInterprocess)
    if is_shared and not flags & eventDisableTiming:
        raise CudaError(1)
    handle = machine.new_handle()
    machine.events[handle] = EventState(getDevice(), is_shared=is_shared)
    return handle


@_translated
def eventCreate():
    return eventCreateWithFlags(eventDefault)


@_translated
def eventDestroy(event):
    _event(event)
    del machine.events[event]


@_translated
def eventRecord(event, stream):
    state = _event(event)
    queue = machine.queue(stream, getDevice())
    if state.device != queue.device:
        raise CudaError(400)
    number = state.note_recorded()
    machine.enqueue(queue, lambda: state.note_completed(number))


@_translated
def eventQuery(event):
    try:
        machine.raise_error()
    except CudaError as error:
        return error.status
    return 0 if _event(event).is_done else 600


@_translated
def eventSynchronize(event):
    state = _event(event)
    machine.synchronize(lambda: state.is_done)


@_translated
def eventElapsedTime(start, end):
    if not (_event(start).is_done and _event(end).is_done):
        raise CudaError(600)
    return 1.0


# Between processes


@_translated
def ipcGetMemHandle(devPtr):
    return machine.memory.export(devPtr)


@_translated
def ipcOpenMemHandle(handle, flags=cudaIpcMemLazyEnablePeerAccess):
    return machine.memory.open(handle, getDevice())


@_translated
def ipcCloseMemHandle(devPtr):
    machine.memory.close(devPtr)


@_translated
def ipcGetEventHandle(event):
    state = _event(event)
    if not state.is_shared:
        raise CudaError(400)
    if not machine.configuration.can_export:
        raise CudaError(801)
    return pack_handle(os.getpid(), state.mapping.descriptor, state.mapping.nbytes)


@_translated
def ipcOpenEventHandle(handle):
    process, descriptor, nbytes = unpack_handle(handle)
    if process == os.getpid():
        raise CudaError(201)
    mapping = Mapping.of_process(process, descriptor, nbytes)
    opened = machine.new_handle()
    machine.events[opened] = EventState(getDevice(), is_shared=False, mapping=mapping)
    return opened
