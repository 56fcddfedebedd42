"""Streams and events, as `cupy.cuda.stream` shows them."""

from __future__ import annotations

import threading
import warnings

from cupy.cuda import runtime

_local = threading.local()


class Event:
    def __init__(self, block=False, disable_timing=False, interprocess=False):
        self.ptr = 0
        self.ptr = runtime.eventCreateWithFlags(
            (block and runtime.eventBlockingSync)
            | (disable_timing and runtime.eventDisableTiming)
            | (interprocess and runtime.eventInterprocess)
        )

    def __del__(self):
        if self.ptr:
            runtime.eventDestroy(self.ptr)

    @property
    def done(self):
        # As in CuPy: also of a device that has failed.
        return runtime.eventQuery(self.ptr) == 0

    def record(self, stream=None):
        runtime.eventRecord(self.ptr, (get_current_stream() if stream is None else stream).ptr)

    def synchronize(self):
        runtime.eventSynchronize(self.ptr)


def get_elapsed_time(start_event, end_event):
    return runtime.eventElapsedTime(start_event.ptr, end_event.ptr)


class _BaseStream:
    ptr = 0
    device_id = -1

    def __init__(self, ptr, device_id):
        self.ptr = ptr
        self.device_id = device_id
        self._previous = []

    def __eq__(self, other):
        return isinstance(other, _BaseStream) and self.ptr == other.ptr

    def __hash__(self):
        return hash(self.ptr)

    def __enter__(self):
        self._previous.append(get_current_stream())
        return self.use()

    def __exit__(self, *_):
        _use(self._previous.pop())

    def use(self):
        if self.device_id not in (-1, runtime.getDevice()):
            raise RuntimeError(f"This stream was not created on device {runtime.getDevice()}, got {self.device_id}")
        _use(self)
        return self

    @property
    def done(self):
        try:
            runtime.streamQuery(self.ptr)
        except runtime.CUDARuntimeError as error:
            if error.status == 600:
                return False
            raise
        return True

    def synchronize(self):
        runtime.streamSynchronize(self.ptr)

    def launch_host_func(self, callback, arg):
        runtime.launchHostFunc(self.ptr, callback, arg)

    def record(self, event=None):
        if event is None:
            event = Event()
        runtime.eventRecord(event.ptr, self.ptr)
        return event

    def wait_event(self, event):
        runtime.streamWaitEvent(self.ptr, event.ptr)


class Stream(_BaseStream):
    null: Stream

    def __init__(self, null=False, non_blocking=False, ptds=False, priority=None):
        self._is_own = not null and not ptds
        flags = runtime.streamNonBlocking if non_blocking else runtime.streamDefault
        ptr = runtime.streamCreateWithFlags(flags) if self._is_own else 2 if ptds else 0
        super().__init__(ptr, runtime.getDevice() if self._is_own else -1)

    def __del__(self):
        if getattr(self, "_is_own", False) and self.ptr:
            runtime.streamDestroy(self.ptr)

    @classmethod
    def from_external(cls, stream):
        version, ptr = stream.__cuda_stream__()
        if version != 0:
            raise ValueError("unsupported version")
        made = cls(null=True)
        made.ptr = ptr
        made._external = stream
        return made


class ExternalStream(_BaseStream):
    def __init__(self, ptr, device_id=-1):
        warnings.warn("ExternalStream is deprecated, use Stream.from_external", DeprecationWarning, stacklevel=2)
        super().__init__(ptr, device_id)


Stream.null = Stream(null=True)


def _use(stream):
    _local.__dict__.setdefault("streams", {})[runtime.getDevice()] = stream


def get_current_stream(device_id=-1):
    device = runtime.getDevice() if device_id < 0 else device_id
    return getattr(_local, "streams", {}).get(device, Stream.null)
