"""Pinned host memory, as `cupy.cuda.pinned_memory` shows it."""

from __future__ import annotations

import ctypes
import functools

from cupy.cuda import runtime


class PinnedMemory:
    """One allocation."""

    def __init__(self, size, flags=0):
        self.ptr = 0
        self.ptr = runtime.hostAlloc(size, flags)

    def __del__(self):
        if self.ptr:
            runtime.freeHost(self.ptr)


class PinnedMemoryPointer:
    """A place in pinned memory; a buffer for everybody who reads buffers."""

    mem: PinnedMemory
    ptr: int

    def size(self):
        return ctypes.sizeof(self)


@functools.cache
def _class_of(nbytes):
    names = {"_type_": ctypes.c_char, "_length_": nbytes}
    return type("PinnedMemoryPointer", (PinnedMemoryPointer, ctypes.Array), names)


def alloc_pinned_memory(size):
    memory = PinnedMemory(max(1, size))
    pointer = _class_of(max(1, size)).from_address(memory.ptr)
    pointer.mem = memory
    pointer.ptr = memory.ptr
    return pointer
