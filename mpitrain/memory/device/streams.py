"""Streams and events of our own, ordered after what a caller has queued and before what it queues next.

Work on a device is queued on streams, and done later. Ours are non-blocking: they neither wait for the default stream
nor hold it up. What orders them is events: those that a caller's stream has to reach before we read its array, and
those that ours have to reach before it reads the result. The device as a whole is never waited for, and a task, which
never blocks, asks an event whether it is `done`.

What a rank that has died was to do never comes, and a stream that waits for it does nothing any more. So memory that
ranks share keeps to the streams that it was made with (`idle_streams`), and what is made anew gets others.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias, cast

from mpitrain.memory.device.arrays import as_cupy, device_id
from mpitrain.memory.device.library import CupyModule, explained, load_cupy
from mpitrain.memory.loaded import loaded_torch
from mpitrain.memory.shared import NodeArray

__all__ = [
    "CallersStream",
    "Event",
    "Stream",
    "Streams",
    "callers_stream",
    "hand_over",
    "idle_streams",
    "is_done",
    "produced",
    "streams_of",
]

Event: TypeAlias = Any
"""A `cupy.cuda.Event`; see `is_done`."""

# What CUDA answers about an event that is still to come.
_NOT_READY = 600
_POLL_S = 1e-3

Stream: TypeAlias = Any
"""A `cupy.cuda.Stream`."""


class Streams:
    """This process's streams on one device; what is queued on one of them is done in that order.

    Args:
        cupy: CuPy.
        device: Number of the device.

    Attributes:
        device: Number of the device.
        down: Copies to the host.
        up: Copies from the host.
        compute: Kernels, and copies within the device.
    """

    def __init__(self, cupy: CupyModule, device: int) -> None:
        self.device = device
        self._cupy = cupy
        with self._cupy.cuda.Device(device):
            self.down, self.up, self.compute = (self._cupy.cuda.Stream(non_blocking=True) for _ in range(3))
        self._has_lingered = False

    @property
    def are_idle(self) -> bool:
        """Whether all that was queued is done; never blocks."""
        return all(stream.done for stream in (self.down, self.up, self.compute))

    def settle(self, limit_s: float) -> bool:
        """Wait until all that was queued is done; whether it is.

        Args:
            limit_s: For no longer than so many seconds, and not again once these were not enough.
        """
        deadline_s = time.monotonic() + (0.0 if self._has_lingered else limit_s)
        while not self.are_idle:
            if time.monotonic() > deadline_s:
                self._has_lingered = True
                return False
            time.sleep(_POLL_S)
        return True

    def settle_device(self, limit_s: float) -> bool:
        """Wait until all that was queued on the device is done, on whatever streams of ours; whether it is.

        CUDA takes memory back only when all work of the device is done, and waits for that without end.

        Args:
            limit_s: As for `settle`.
        """
        key = self._cupy, self.device
        with _making:
            earlier = [streams for streams in _earlier.pop(key, []) if not streams.are_idle]
            if earlier:
                _earlier[key] = earlier
        return all(streams.settle(limit_s) for streams in (*earlier, _current[key]))

    def copy(self, dest: Any, source: Any, stream: Stream) -> None:
        """Queue a copy of a contiguous array to another one of as many bytes; each is CuPy's, or NumPy's and pinned."""
        pointers = [
            int(array.data.ptr) if isinstance(array, self._cupy.ndarray) else int(array.__array_interface__["data"][0])
            for array in (dest, source)
        ]
        runtime = self._cupy.cuda.runtime
        runtime.memcpyAsync(*pointers, source.nbytes, runtime.memcpyDefault, stream.ptr)

    def record(self, stream: Stream) -> Event:
        """Return an event that is done when what was queued on one of these streams is."""
        return _record(self._cupy, self.device, stream.ptr)


class CallersStream:
    """The stream that a caller works on: the current one of its thread, in the library that owns its array.

    To be made in the caller's thread; can be used in any.

    Args:
        array: A device array of any library.
        name: What messages call it.

    Attributes:
        device: Number of the device.
        ready: An event that is done when what the caller has queued before the last `enter` is.
    """

    def __init__(self, array: object, *, name: str = "array") -> None:
        self._array = array
        self._name = name
        self.enter()

    def enter(self) -> None:
        """Take note of what the caller's current stream is, and what it has queued."""
        self._cupy = load_cupy(self._name)
        self.device, self._pointers = _current_streams(self._cupy, self._array, self._name)
        torch = loaded_torch()
        # A stream of torch is made current by torch, as it is torch that allocates there.
        self._torch = torch if torch is not None and isinstance(self._array, torch.Tensor) else None
        library = self._cupy if self._torch is None else self._torch
        ask = library.cuda.get_current_stream if self._torch is None else library.cuda.current_stream
        self._stream = ask(self.device)
        self.ready = self.record()

    def record(self) -> Event:
        """Return an event that is done when what is queued on the stream by now is."""
        return _record_all(self._cupy, self.device, self._pointers)

    @contextlib.contextmanager
    def current(self) -> Iterator[None]:
        """Make it the current stream of this thread."""
        if self._torch is not None:
            with self._torch.cuda.stream(self._stream):
                yield
        else:
            with self._cupy.cuda.Device(self.device), self._stream:
                yield


_making = threading.Lock()


# By CuPy, of which tests have several, and device.
_current: dict[tuple[CupyModule, int], Streams] = {}
# Those that were busy when others took their place.
_earlier: dict[tuple[CupyModule, int], list[Streams]] = {}


def streams_of(device: int) -> Streams:
    """Return this process's streams on a device; those of memory that ranks share may be others.

    Raises:
        UnavailableError: CuPy is not installed.
    """
    cupy = load_cupy("streams")
    # No lock for those that are there.
    return _current.get((cupy, device)) or _make(cupy, device, lambda _: True)


def idle_streams(device: int) -> Streams:
    """Return streams on which nothing is queued, and which are this process's from now on: new ones, if need be.

    What is queued on those so far may wait for what never comes. Who has them goes on with them: what was queued in
    their order stays so.

    Raises:
        UnavailableError: CuPy is not installed.
    """
    return _make(load_cupy("streams"), device, lambda streams: streams.are_idle)


def _make(cupy: CupyModule, device: int, is_fit: Callable[[Streams], bool]) -> Streams:
    with _making:  # two threads that come first must not get different ones
        found = _current.get((cupy, device))
        if found is None or not is_fit(found):
            with explained("streams"):
                made = Streams(cupy, device)
            if found is not None:
                _earlier.setdefault((cupy, device), []).append(found)
            found = _current[cupy, device] = made
        return found


def is_done(event: Event) -> bool:
    """Whether the work before an event has ended; never blocks.

    Raises:
        RuntimeError: The device has failed, so the event never comes; its own `done` would say no for ever.
    """
    runtime = load_cupy("event").cuda.runtime
    status = int(runtime.eventQuery(event.ptr))
    if status not in (0, _NOT_READY):
        raise runtime.CUDARuntimeError(status)
    return status == 0


def produced(array: object, *, name: str = "array") -> Event:
    """Return an event that is done when what the caller has queued before, on its current stream, is.

    Torch and CuPy have current streams of their own, one per thread, so the library that owns `array` is asked, in
    the thread of the caller.

    Args:
        array: A device array of any library.
        name: What messages call it.

    Raises:
        UnavailableError: CuPy is not installed.
    """
    cupy = load_cupy(name)
    return _record_all(cupy, *_current_streams(cupy, array, name))


@contextlib.contextmanager
def callers_stream(array: object, *, name: str = "array") -> Iterator[Stream]:
    """Give the stream that the caller works on as one of CuPy's, and make its device the current one.

    Args:
        array: A device array, whose library is asked as in `produced`.
        name: What messages call it.
    """
    cupy = load_cupy(name)
    device, pointers = _current_streams(cupy, array, name)
    with cupy.cuda.Device(device):
        if hasattr(cupy.cuda.Stream, "from_external"):
            yield cupy.cuda.Stream.from_external(_External(pointers[0]))
        else:  # CuPy 13
            yield cupy.cuda.ExternalStream(pointers[0], device)


class _External:
    """A stream of another library, as CUDA's protocol for such streams wants it."""

    def __init__(self, pointer: int) -> None:
        self._pointer = pointer

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self._pointer


def hand_over(array: object, event: Event, *, name: str = "array") -> None:
    """Have what the caller queues from now on, on its current stream, wait for `event`; the caller itself does not.

    Args:
        array: A device array of any library, whose library is asked as in `produced`.
        event: Of any stream of this process.
        name: What messages call it.
    """
    cupy = load_cupy(name)
    device, streams = _current_streams(cupy, array, name)
    # The default stream has the same handle on all devices.
    with cupy.cuda.Device(device):
        for stream in streams:
            cupy.cuda.runtime.streamWaitEvent(stream, event.ptr)


def _current_streams(cupy: CupyModule, array: object, name: str) -> tuple[int, list[int]]:
    """Return the number of the device that holds `array`, and handles of the streams that its owner works on."""
    torch = loaded_torch()
    if torch is not None and isinstance(array, torch.Tensor):
        tensor = cast("Any", array)
        return int(tensor.device.index), [int(torch.cuda.current_stream(tensor.device).cuda_stream)]
    is_ours = isinstance(array, NodeArray)
    device = device_id(cast("Any", array).flat if is_ours else as_cupy(array, name=name))
    streams = [int(cupy.cuda.get_current_stream(device).ptr)]
    if is_ours and torch is not None and torch.cuda.is_initialized():
        # Of memory of ours, both libraries have views.
        streams.append(int(torch.cuda.current_stream(device).cuda_stream))
    return device, sorted(set(streams))


def _record_all(cupy: CupyModule, device: int, streams: Sequence[int]) -> Event:
    events = [_record(cupy, device, stream) for stream in streams]
    if len(events) == 1:
        return events[0]
    ours = streams_of(device)
    for event in events:
        ours.compute.wait_event(event)
    return ours.record(ours.compute)


def _record(cupy: CupyModule, device: int, stream: int) -> Event:
    # An event belongs to the device that is current when it is made, and takes the streams of that one only.
    with cupy.cuda.Device(device):
        event = cupy.cuda.Event(disable_timing=True)
        cupy.cuda.runtime.eventRecord(event.ptr, stream)
    return event
