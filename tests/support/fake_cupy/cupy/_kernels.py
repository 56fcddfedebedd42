"""Kernels: compiled for the host, and launched as work of the current stream."""

from __future__ import annotations

import importlib

import numpy as np
from cupy._arrays import ndarray
from cupy._machine import machine
from cupy.cuda import runtime
from cupy.cuda.stream import get_current_stream

# Where a module's code is compiled: `compile_host(code, options)` returns an object whose `launch(name, grid, block,
# arguments, shared_mem)` runs a kernel on plain addresses and NumPy scalars.
COMPILER = "tests.support.host_kernels"
_MOST_BLOCKS = (2**31 - 1, 65535, 65535)
_MOST_THREADS = (1024, 1024, 64)


class RawKernel:
    def __init__(
        self,
        code,
        name,
        options=(),
        backend="nvrtc",
        translate_cucomplex=False,
        *,
        enable_cooperative_groups=False,
        jitify=None,
    ):
        self.code = code
        self.name = name
        self.options = options
        self._compiled = importlib.import_module(COMPILER).compile_host(code, options)

    def __call__(self, grid, block, args, *, shared_mem=0):
        # Launches keep nothing alive, so what is given is an address from now on.
        arguments = [argument.data.ptr if isinstance(argument, ndarray) else _scalar(argument) for argument in args]
        limits = [*_MOST_BLOCKS[: len(grid)], *_MOST_THREADS[: len(block)]]
        if not all(1 <= count <= limit for count, limit in zip((*grid, *block), limits, strict=True)):
            raise runtime.CUDARuntimeError(9)
        queue = machine.queue(get_current_stream().ptr, runtime.getDevice())
        machine.enqueue(queue, lambda: self._compiled.launch(self.name, grid, block, arguments, shared_mem))


def _scalar(argument):
    if isinstance(argument, int | float | bool | np.generic):
        return argument
    if isinstance(argument, np.ndarray):  # a structure passed by value
        return argument.copy()
    raise TypeError(f"Unsupported type {type(argument)}")


class RawModule:
    def __init__(
        self,
        code=None,
        *,
        path=None,
        options=(),
        backend="nvrtc",
        translate_cucomplex=False,
        enable_cooperative_groups=False,
        name_expressions=None,
        jitify=None,
    ):
        self.code = code
        self.options = options

    def get_function(self, name):
        return RawKernel(self.code, name, self.options)
