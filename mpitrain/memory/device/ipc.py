"""Device memory that all ranks of a node map by CUDA IPC, and events that order what they do with it.

A handle names a whole allocation of cudaMalloc, and allocations of pools cannot be handed over at all in some of their
kinds. So the memory is an allocation of our own, and made for this purpose.

A mapping must not outlive the memory: whoever gives a block up closes what it has mapped, waits until all others have
done the same, and lets its own memory go only then (`Holdings.close`). Where something is queued that is never done,
nobody lets go.
"""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Callable, Generator, Sequence
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np

from mpitrain.errors import UnavailableError
from mpitrain.memory.device.library import CupyArray, explained, load_cupy
from mpitrain.memory.device.streams import Event, Stream, Streams, idle_streams

__all__ = ["DeviceBlock", "Holdings", "allocate_mapped_device", "mapping_device_memory"]

Result = TypeVar("Result")

_log = logging.getLogger("mpitrain")

_SUBJECT = "device memory"
# Smaller allocations of cudaMalloc may be parts of a larger one, all of which a handle would hand over.
_GRAIN_NBYTES = 2 << 20
# What a rank writes to the begin of its memory, for the others to find there.
_MARK_NBYTES = 16
_TOKEN = uuid.uuid4().hex
# What a device is still busy with when an operation has ended takes less by far.
_PATIENCE_S = 10.0


class _Export(NamedTuple):
    """What a rank tells the others about its memory.

    Attributes:
        process: Tells processes apart, also those of containers that count processes anew.
        address: Of the memory, for ranks that are threads of this process.
        memory: Handle of the memory.
        event_addresses: Of the events, as `address`.
        events: Handles of the events.
        mark: What the memory begins with.
        problem: Why there is nothing to tell; "" if there is.
    """

    process: tuple[str, int]
    address: int = 0
    memory: bytes = b""
    event_addresses: tuple[int, ...] = ()
    events: tuple[bytes, ...] = ()
    mark: bytes = b""
    problem: str = ""


class _Own(NamedTuple):
    """What this rank has made, and the streams on which all work on it is queued."""

    memory: Any
    events: list[Event]
    export: _Export
    streams: Streams


class _Opened(NamedTuple):
    """Memory and events of all other ranks, by rank on the node; what there is of this one is not used."""

    addresses: list[int]
    events: list[tuple[int, ...]]


class Holdings:
    """What is left of a block when nothing refers to it any more: memory that others map, and mappings of theirs.

    Args:
        own: This rank's.
        mappings: Of the others'.

    Attributes:
        own: The same.
    """

    def __init__(self, own: _Own, mappings: _Mappings) -> None:
        self.own = own
        self._mappings = mappings
        _open.add(self)

    def close(self) -> Callable[[], None] | Literal[False]:
        """Close the mappings.

        Returns:
            What lets go of the memory, to be called when all ranks have closed theirs; False if something is queued
            on the device that is not done within some seconds, as it waits for a rank that has failed: all ranks keep
            what they have.
        """
        # What an operation has queued may still be at work after the operation has ended for the host.
        if not self.own.streams.settle_device(_PATIENCE_S):
            _log.warning(
                "device memory: %.1f MiB of cuda:%d stay allocated, as the device waits for a rank that has failed; "
                "end the process to free them",
                self.own.memory.size / 2**20,
                self.own.streams.device,
            )
            return False
        self._mappings.close()
        return self._let_go

    def _let_go(self) -> None:
        _open.discard(self)
        del self.own


# What is given up otherwise stays until the process ends, as others may still use it.
_open: set[Holdings] = set()


class DeviceBlock:
    """The memory of all ranks of a node, on one device or several, and events of each.

    Args:
        rank: This rank on the node.
        nbytes: Of each rank's memory.
        holdings: What the block is made of, and what is to be closed after it.
        opened: Those of the others.

    Attributes:
        device: Number of the device of this rank's own memory.
        holdings: The same.
        streams: On which all work on the block is to be queued.
        views: Each rank's memory as bytes, by rank on the node.
    """

    def __init__(self, rank: int, nbytes: int, holdings: Holdings, opened: _Opened) -> None:
        self.streams = holdings.own.streams
        self.device = device = self.streams.device
        self.holdings = holdings
        self._cupy = load_cupy(_SUBJECT)
        self._runtime = self._cupy.cuda.runtime
        self._own_events = holdings.own.events
        self._others_events = [events for peer, events in enumerate(opened.events) if peer != rank]
        cuda, memory = self._cupy.cuda, holdings.own.memory
        memories = [cuda.UnownedMemory(address, memory.size, None, device) for address in opened.addresses]
        memories[rank] = memory
        self.views: list[CupyArray] = [
            self._cupy.ndarray((nbytes,), np.uint8, cuda.MemoryPointer(each, 0)) for each in memories
        ]

    def typed(self, storage: np.dtype[Any], offset_nbytes: int, count: int) -> list[CupyArray]:
        """Return the same part of every rank's memory as arrays of `count` elements."""
        end = offset_nbytes + count * storage.itemsize
        return [view[offset_nbytes:end].view(storage) for view in self.views]

    def record(self, number: int, stream: Stream) -> None:
        """Have this rank's event of a number be done when what was queued on the stream is; for others to wait for."""
        with self._cupy.cuda.Device(self.device):
            self._runtime.eventRecord(self._own_events[number].ptr, stream.ptr)

    def wait(self, number: int, stream: Stream) -> None:
        """Have what is queued on the stream from now on wait for the events of all other ranks.

        Each must have been recorded, and the rank have said so: what was never recorded holds nobody up.
        """
        for events in self._others_events:
            self._runtime.streamWaitEvent(stream.ptr, events[number])


def allocate_mapped_device(
    rank: int, nbytes: int, num_events: int, device: int, share: Callable[[Any], list[Any]]
) -> DeviceBlock:
    """Allocate as `mapping_device_memory` does.

    Args:
        rank: This rank, among those of `share`.
        nbytes: See there; likewise the next two.
        num_events: See there.
        device: See there.
        share: Collects a value of each rank on every rank, all of which are on one node; every one must call.

    Raises:
        UnavailableError: See there.
    """
    steps = mapping_device_memory(rank, nbytes, num_events, device)
    try:
        value = next(steps)
        while True:
            value = steps.send(share(value))
    except StopIteration as stop:
        return stop.value  # type: ignore[no-any-return]


def mapping_device_memory(
    rank: int, nbytes: int, num_events: int, device: int
) -> Generator[Any, list[Any], DeviceBlock]:
    """Allocate device memory per rank that all ranks map; zero at first.

    Yields values of this rank, and is sent those of all ranks, by rank; as many on every rank.

    Args:
        rank: This rank, on its node.
        nbytes: Size of this rank's memory, the same on every rank; at least 1.
        num_events: How many events each rank has, the same on every rank.
        device: Number of this rank's device; ranks may share one.

    Raises:
        UnavailableError: A rank has no device, no room or no access to a peer's memory; on every rank, with the reason
            of the first such rank.
    """
    own, problem = _attempt(lambda: _allocate(nbytes, num_events, device))
    exports: list[_Export] = yield (_Export(_process(), problem=problem) if own is None else own.export)
    _raise_first([each.problem for each in exports])
    assert own is not None
    mappings = _Mappings(own.streams)
    opened, problem = _attempt(lambda: mappings.open(exports, rank))
    problems = yield (problem and f"rank {rank} of the node cannot map the memory of the others: {problem}")
    if any(problems) or opened is None:
        mappings.close()
        yield ""  # nobody maps this rank's memory any more when it goes
        _raise_first(problems)
    assert opened is not None
    stream = own.streams.compute
    mappings.runtime.memsetAsync(own.memory.ptr, 0, _MARK_NBYTES, stream.ptr)
    stream.synchronize()
    yield ""  # only now is the memory of all ranks zero
    return DeviceBlock(rank, nbytes, Holdings(own, mappings), opened)


class _Mappings:
    """What this rank has opened of others.

    Args:
        streams: Of the device that it is mapped for.
    """

    def __init__(self, streams: Streams) -> None:
        self._cupy = load_cupy(_SUBJECT)
        self.runtime = self._cupy.cuda.runtime
        self._streams = streams
        self._memories: list[int] = []
        self._events: list[int] = []

    def open(self, exports: Sequence[_Export], rank: int) -> _Opened:
        """Open what the others have exported.

        Raises:
            RuntimeError: It cannot be opened, or is not what they have written.
        """
        opened = _Opened([], [])
        with self._cupy.cuda.Device(self._streams.device):
            for peer, export in enumerate(exports):
                # A handle cannot be opened in the process that it comes from.
                is_here = peer == rank or export.process == _process()
                opened.addresses.append(export.address if is_here else self._map(export))
                opened.events.append(export.event_addresses if is_here else self._open_events(export))
        return opened

    def _map(self, export: _Export) -> int:
        address = int(self.runtime.ipcOpenMemHandle(export.memory))
        self._memories.append(address)
        found = np.zeros(_MARK_NBYTES, np.uint8)
        stream = self._streams.down
        kind = self.runtime.memcpyDeviceToHost
        self.runtime.memcpyAsync(found.ctypes.data, address, _MARK_NBYTES, kind, stream.ptr)
        stream.synchronize()
        if found.tobytes() != export.mark:
            raise UnavailableError("other bytes are mapped than the peer has written")
        return address

    def _open_events(self, export: _Export) -> tuple[int, ...]:
        opened = tuple(int(self.runtime.ipcOpenEventHandle(handle)) for handle in export.events)
        self._events += opened
        return opened

    def close(self) -> None:
        """Close everything."""
        with self._cupy.cuda.Device(self._streams.device):
            while self._memories:
                self.runtime.ipcCloseMemHandle(self._memories.pop())
            while self._events:
                self.runtime.eventDestroy(self._events.pop())


def _allocate(nbytes: int, num_events: int, device: int) -> _Own:
    """Make memory and events of this rank."""
    cupy = load_cupy(_SUBJECT)
    streams = idle_streams(device)
    runtime, stream = cupy.cuda.runtime, streams.compute
    with explained(_SUBJECT), cupy.cuda.Device(device):
        memory = cupy.cuda.Memory(-(-nbytes // _GRAIN_NBYTES) * _GRAIN_NBYTES)
        events = [cupy.cuda.Event(disable_timing=True, interprocess=True) for _ in range(num_events)]
        mark = np.frombuffer(uuid.uuid4().bytes, np.uint8)
        runtime.memsetAsync(memory.ptr, 0, memory.size, stream.ptr)
        runtime.memcpyAsync(memory.ptr, mark.ctypes.data, _MARK_NBYTES, runtime.memcpyHostToDevice, stream.ptr)
        stream.synchronize()
        export = _Export(
            _process(),
            memory.ptr,
            runtime.ipcGetMemHandle(memory.ptr),
            tuple(event.ptr for event in events),
            tuple(runtime.ipcGetEventHandle(event.ptr) for event in events),
            mark.tobytes(),
        )
    return _Own(memory, events, export, streams)


def _attempt(function: Callable[[], Result]) -> tuple[Result | None, str]:
    """Return what a function returns, or None and why not: the others have to hear of that before it is raised."""
    try:
        return function(), ""
    except (RuntimeError, MemoryError) as error:  # CuPy's errors are among the former
        return None, str(error) or type(error).__name__


def _raise_first(problems: Sequence[str]) -> None:
    for problem in problems:
        if problem:
            raise UnavailableError(f"device memory: cannot be shared on this node ({problem})")


def _process() -> tuple[str, int]:
    # A process that was forked has the same token.
    return _TOKEN, os.getpid()
