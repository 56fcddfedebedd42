"""The device behind the stand-in: memory in files that have no name, and queues that a thread works off late.

Work is never done in the call that queues it, but some time later and in an order that only streams and events decide.
Code that forgets to wait therefore reads what was there before.
"""

from __future__ import annotations

import atexit
import bisect
import ctypes
import dataclasses
import itertools
import mmap
import os
import threading
import time
import traceback
from collections import deque

import numpy as np

UNINITIALIZED, FREED = 0xFF, 0xDD
_HANDLE_NBYTES = 64


@dataclasses.dataclass
class Configuration:
    """What the pretended machine is like; read from the environment, so that started processes have the same."""

    num_devices: int = int(os.environ.get("STAND_IN_DEVICES", "1"))
    total_nbytes: int = int(os.environ.get("STAND_IN_DEVICE_NBYTES", str(1 << 30)))
    latency_s: float = float(os.environ.get("STAND_IN_LATENCY_S", "0.0005"))
    peer_access: bool = os.environ.get("STAND_IN_PEER_ACCESS", "1") == "1"
    can_export: bool = os.environ.get("STAND_IN_IPC", "1") == "1"

    def physical(self) -> list[int]:
        """Devices of the machine that this process sees."""
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        everything = range(self.num_devices)
        if visible is None:
            return list(everything)
        return [int(number) for number in visible.split(",") if number.strip() and int(number) in everything]


class CudaError(Exception):
    """A status of the CUDA runtime; `runtime` turns it into its own exception."""

    def __init__(self, status):
        super().__init__(status)
        self.status = status


# Memory


class Mapping:
    """A file without a name, mapped: the same bytes can be mapped by other processes through this one's descriptor."""

    def __init__(self, descriptor, nbytes):
        self.descriptor = descriptor
        self.nbytes = nbytes
        self.map = mmap.mmap(descriptor, max(1, nbytes))
        self.bytes = np.frombuffer(self.map, np.uint8)
        self.address = self.bytes.ctypes.data

    @classmethod
    def make(cls, nbytes):
        descriptor = os.memfd_create("stand-in")
        os.ftruncate(descriptor, max(1, nbytes))
        return cls(descriptor, nbytes)

    @classmethod
    def of_process(cls, process, descriptor, nbytes):
        number = os.open(f"/proc/{process}/fd/{descriptor}", os.O_RDWR)
        return cls(number, nbytes)


@dataclasses.dataclass
class Allocation:
    """Device memory of one cudaMalloc, or of another process."""

    mapping: Mapping
    device: int
    is_exportable: bool = True
    is_foreign: bool = False
    uses: int = 1

    @property
    def address(self):
        return self.mapping.address

    @property
    def end(self):
        return self.mapping.address + self.mapping.nbytes


class Memory:
    """Everything that is allocated, by address."""

    def __init__(self, configuration):
        self._configuration = configuration
        self._lock = threading.RLock()
        self._addresses = []
        self._allocations = {}
        self._foreign = {}
        # What is freed stays mapped, so that late work finds wrong values and not a fault.
        self._graves = []

    def used_nbytes(self, device):
        return sum(
            each.mapping.nbytes for each in self._allocations.values() if each.device == device and not each.is_foreign
        )

    def allocate(self, nbytes, device, *, is_exportable=True):
        with self._lock:
            if self.used_nbytes(device) + nbytes > self._configuration.total_nbytes:
                raise CudaError(2)
            mapping = Mapping.make(nbytes)
            mapping.bytes[:] = UNINITIALIZED
            return self._add(Allocation(mapping, device, is_exportable))

    def _add(self, allocation):
        bisect.insort(self._addresses, allocation.address)
        self._allocations[allocation.address] = allocation
        return allocation

    def _remove(self, allocation):
        self._addresses.remove(allocation.address)
        del self._allocations[allocation.address]
        self._graves.append(allocation)

    def free(self, address):
        with self._lock:
            allocation = self._allocations.get(address)
            if allocation is None or allocation.is_foreign:
                raise CudaError(1)
            allocation.mapping.bytes[:] = FREED
            self._remove(allocation)

    def find(self, address):
        """Return the allocation that an address lies in, None for memory that is not the device's."""
        with self._lock:
            place = bisect.bisect_right(self._addresses, address) - 1
            if place < 0:
                return None
            allocation = self._allocations[self._addresses[place]]
            return allocation if address < max(allocation.end, allocation.address + 1) else None

    def export(self, address):
        allocation = self.find(address)
        if allocation is None or allocation.is_foreign or not allocation.is_exportable:
            raise CudaError(1)
        if not self._configuration.can_export:
            raise CudaError(801)
        mapping = allocation.mapping
        device = self._configuration.physical()[allocation.device]
        return pack_handle(os.getpid(), mapping.descriptor, mapping.nbytes, device)

    def open(self, handle, device):
        process, descriptor, nbytes, owner = unpack_handle(handle)
        if process == os.getpid():
            raise CudaError(201)
        physical = self._configuration.physical()
        if owner != physical[device] and not self._configuration.peer_access:
            raise CudaError(217)
        with self._lock:
            if handle in self._foreign:
                self._foreign[handle].uses += 1
                return self._foreign[handle].address
            mapping = Mapping.of_process(process, descriptor, nbytes)
            allocation = Allocation(mapping, device, is_exportable=False, is_foreign=True)
            self._foreign[handle] = self._add(allocation)
            return allocation.address

    def close(self, address):
        with self._lock:
            allocation = self._allocations.get(address)
            if allocation is None or not allocation.is_foreign:
                raise CudaError(1)
            allocation.uses -= 1
            if not allocation.uses:
                self._remove(allocation)
                self._foreign = {key: each for key, each in self._foreign.items() if each is not allocation}


def pack_handle(*numbers):
    return ":".join(str(number) for number in numbers).encode().ljust(_HANDLE_NBYTES, b"\0")


def unpack_handle(handle):
    if len(handle) != _HANDLE_NBYTES:
        raise CudaError(1)
    return [int(number) for number in handle.rstrip(b"\0").split(b":")]


def bytes_at(address, nbytes):
    """Return memory as an array of bytes."""
    if not nbytes:
        return np.empty(0, np.uint8)
    return np.frombuffer((ctypes.c_uint8 * nbytes).from_address(address), np.uint8)


# Streams and events


class EventState:
    """How often an event was recorded, and up to which of these the work before it is done."""

    def __init__(self, device, *, is_shared, mapping=None):
        self.device = device
        self.is_shared = is_shared
        if is_shared and mapping is None:
            mapping = Mapping.make(16)
            mapping.bytes[:] = 0
        self.mapping = mapping
        self._cells = np.zeros(2, np.int64) if mapping is None else mapping.bytes.view(np.int64)

    @property
    def recorded(self):
        return int(self._cells[0])

    @property
    def completed(self):
        return int(self._cells[1])

    def note_recorded(self):
        self._cells[0] += 1
        return self.recorded

    def note_completed(self, number):
        self._cells[1] = max(number, self.completed)

    @property
    def is_done(self):
        return self.completed >= self.recorded


@dataclasses.dataclass
class Work:
    """Something queued."""

    number: int
    run: object
    is_ready: object
    due_s: float


class Queue:
    """What is behind a stream."""

    def __init__(self, device, *, is_null=False, is_non_blocking=False):
        self.device = device
        self.is_null = is_null
        self.is_non_blocking = is_non_blocking
        self.work = deque()


class Machine:
    """Queues, and the thread that works them off."""

    def __init__(self):
        self.configuration = Configuration()
        self.memory = Memory(self.configuration)
        self.queues = {}
        self.events = {}
        self.pinned = []
        self.num_device_synchronizes = 0
        self._numbers = itertools.count(1)
        self._handles = itertools.count(0x1000, 0x10)
        self._changed = threading.Condition()
        self._is_held = False
        self._is_closed = False
        self._error = 0
        self._thread = None
        atexit.register(self.close)

    def new_handle(self):
        return next(self._handles)

    def queue(self, stream, device):
        """Return the queue of a stream; those of the default stream are made when they are used."""
        if stream in (0, 1, 2):
            with self._changed:
                return self.queues.setdefault((0, device), Queue(device, is_null=True))
        try:
            return self.queues[stream]
        except KeyError:
            raise CudaError(400) from None

    def enqueue(self, queue, run, is_ready=lambda: True):
        with self._changed:
            due_s = time.monotonic() + self.configuration.latency_s
            queue.work.append(Work(next(self._numbers), run, is_ready, due_s))
            if self._thread is None and not self._is_closed:
                self._thread = threading.Thread(target=self._serve, name="stand-in device", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def _serve(self):
        while not self._is_closed:
            with self._changed:
                candidates = [] if self._is_held else [queue for queue in self.queues.values() if queue.work]
                pairs = [(queue, queue.work[0]) for queue in candidates]
                # The last one first: what is not ordered by streams and events is not done as it was queued.
                pairs = sorted(pairs, key=lambda pair: -pair[1].number)
                ready = next((pair for pair in pairs if self._may_run(*pair)), None)
                if ready is None:
                    self._changed.wait(0.0002 if candidates else 0.05)
                    continue
            queue, work = ready
            try:
                work.run()
            except CudaError as error:
                self._error = error.status
            except Exception:
                traceback.print_exc()
                self._error = 700
            finally:
                with self._changed:
                    queue.work.popleft()
                    self._changed.notify_all()

    def _may_run(self, queue, work):
        if time.monotonic() < work.due_s or not work.is_ready():
            return False
        # The default stream and all others but non-blocking ones wait for each other.
        if queue.is_non_blocking:
            return True
        others = [
            each
            for each in self.queues.values()
            if each is not queue and each.device == queue.device and not each.is_non_blocking
        ]
        return not any(
            each.work[0].number < work.number for each in others if each.work and (queue.is_null or each.is_null)
        )

    def hold(self, is_held):
        with self._changed:
            self._is_held = is_held
            self._changed.notify_all()

    def is_idle(self, queue):
        return not queue.work

    def synchronize(self, is_over):
        """Wait until the thread has done what is asked for."""
        if threading.current_thread() is self._thread:
            return
        with self._changed:
            while not is_over() and not self._is_closed:
                self._changed.wait(0.001)
        self.raise_error()

    def raise_error(self):
        if self._error:
            raise CudaError(self._error)

    def close(self):
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()


machine = Machine()
