"""Pinned host memory, as `cupy.cuda.pinned_memory` shows it."""

from __future__ import annotations

import ctypes
import functools

from cupy.cuda import runtime


class PinnedMemory:
    """One allocation."""

    def __init__(self, size, flags=0):
        self.nbytes = size
        self.ptr = 0
        self.ptr = runtime.hostAlloc(size, flags)

    def __del__(self):
        if self.ptr:
            runtime.freeHost(self.ptr)


class PinnedMemoryPointer:
    """A place in pinned memory; a buffer for everybody who reads buffers."""

    mem: PinnedMemory
    ptr: int

    def __new__(cls, mem, offset):
        pointer = _class_of(mem.nbytes - offset).from_address(mem.ptr + offset)
        pointer.mem = mem
        pointer.ptr = mem.ptr + offset
        return pointer

    def __init__(self, mem, offset):
        """Everything is done."""

    def size(self):
        return ctypes.sizeof(self)


@functools.cache
def _class_of(nbytes):
    names = {"_type_": ctypes.c_char, "_length_": nbytes}
    return type("PinnedMemoryPointer", (PinnedMemoryPointer, ctypes.Array), names)


def alloc_pinned_memory(size):
    return PinnedMemoryPointer(PinnedMemory(max(1, size)), 0)
