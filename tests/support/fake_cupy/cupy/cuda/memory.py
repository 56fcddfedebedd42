"""Device memory, as `cupy.cuda.memory` shows it: plain allocations and a pool that cuts them up."""

from __future__ import annotations

import threading
from collections import defaultdict

from cupy.cuda import runtime
from cupy.cuda.device import Device

_GRAIN_NBYTES = 512
_CHUNK_NBYTES = 1 << 20


class OutOfMemoryError(MemoryError):
    def __init__(self, size, total, limit=0):
        super().__init__(f"Out of memory allocating {size:,} bytes (allocated so far: {total:,} bytes).")


class BaseMemory:
    """Memory on a CUDA device."""

    ptr = 0
    size = 0
    device_id = -1

    @property
    def device(self):
        return Device(self.device_id)


class Memory(BaseMemory):
    """One cudaMalloc."""

    def __init__(self, size):
        self.size = size
        self.device_id = runtime.getDevice()
        self.ptr = 0
        if size:
            self.ptr = runtime.malloc(size)

    def __del__(self):
        if self.ptr:
            runtime.free(self.ptr)


class UnownedMemory(BaseMemory):
    """Memory of somebody else, who is kept alive."""

    def __init__(self, ptr, size, owner, device_id=-1):
        self.ptr = ptr
        self.size = size
        self._owner = owner
        self.device_id = device_id if device_id >= 0 else max(0, runtime.pointerGetAttributes(ptr).device)


class MemoryPointer:
    """A place in device memory."""

    def __init__(self, mem, offset):
        self.mem = mem
        self.ptr = mem.ptr + offset

    @property
    def device_id(self):
        return self.mem.device_id

    @property
    def device(self):
        return self.mem.device

    def __add__(self, offset):
        return MemoryPointer(self.mem, self.ptr - self.mem.ptr + offset)

    def copy_from_device_async(self, src, size, stream=None):
        runtime.memcpyAsync(self.ptr, src.ptr, size, runtime.memcpyDeviceToDevice, _pointer(stream))

    def copy_from_host_async(self, mem, size, stream=None):
        runtime.memcpyAsync(self.ptr, _address(mem), size, runtime.memcpyHostToDevice, _pointer(stream))

    def copy_to_host_async(self, mem, size, stream=None):
        runtime.memcpyAsync(_address(mem), self.ptr, size, runtime.memcpyDeviceToHost, _pointer(stream))

    def memset_async(self, value, size, stream=None):
        runtime.memsetAsync(self.ptr, value, size, _pointer(stream))


def _address(mem):
    return getattr(mem, "value", mem)


def _pointer(stream):
    from cupy.cuda.stream import get_current_stream

    return (get_current_stream() if stream is None else stream).ptr


class _PooledMemory(BaseMemory):
    def __init__(self, pool, chunk, offset, size, arena):
        self.ptr = chunk.ptr + offset
        self.size = size
        self.device_id = chunk.device_id
        self._place = (chunk, offset, size)
        self._pool = pool
        self._arena = arena

    def __del__(self):
        self._pool._give_back(self._arena, self._place)


class MemoryPool:
    """Cuts up large allocations, and gives memory out again on the stream that it was given back on."""

    def __init__(self, allocator=None):
        self._lock = threading.RLock()
        self._free = defaultdict(list)
        self._total_nbytes = 0

    def malloc(self, size):
        from cupy.cuda.stream import get_current_stream

        rounded = max(1, -(-size // _GRAIN_NBYTES)) * _GRAIN_NBYTES
        arena = (runtime.getDevice(), get_current_stream().ptr)
        with self._lock:
            fitting = [place for place in self._free[arena] if place[2] >= rounded]
            if fitting:
                chunk, offset, available = min(fitting, key=lambda place: place[2])
                self._free[arena].remove((chunk, offset, available))
            else:
                chunk, offset, available = self._new_chunk(rounded, arena), 0, max(rounded, _CHUNK_NBYTES)
            if available > rounded:
                self._free[arena].append((chunk, offset + rounded, available - rounded))
        return MemoryPointer(_PooledMemory(self, chunk, offset, rounded, arena), 0)

    def _new_chunk(self, rounded, arena):
        wanted = max(rounded, _CHUNK_NBYTES)
        try:
            chunk = Memory(wanted)
        except runtime.CUDARuntimeError as error:
            if error.status != 2:
                raise
            raise OutOfMemoryError(wanted, self._total_nbytes) from None
        self._total_nbytes += wanted
        return chunk

    def _give_back(self, arena, place):
        with self._lock:
            self._free[arena].append(place)

    def total_bytes(self):
        return self._total_nbytes

    def used_bytes(self):
        return self._total_nbytes - self.free_bytes()

    def free_bytes(self):
        return sum(place[2] for places in self._free.values() for place in places)

    def free_all_blocks(self, stream=None):
        """Blocks that are in use keep their chunk."""
        with self._lock:
            self._free.clear()
            self._total_nbytes = 0


_default_pool = MemoryPool()
_allocator = _default_pool.malloc


def alloc(size):
    return get_allocator()(size)


def set_allocator(allocator=None):
    global _allocator  # noqa: PLW0603
    _allocator = allocator or _malloc


def get_allocator():
    return _allocator


def _malloc(size):
    """Return memory without a pool."""
    try:
        return MemoryPointer(Memory(size), 0)
    except runtime.CUDARuntimeError as error:
        if error.status != 2:
            raise
        raise OutOfMemoryError(size, 0) from None
