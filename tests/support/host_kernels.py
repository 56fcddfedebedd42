"""The sources of `kernels/`, compiled for the host: what a launch does, without a device.

A compiled kernel is kept in `build/host-kernels` under a digest of everything that went into it, so each is compiled
once, whichever process needs it first.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import re
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

__all__ = ["HostModule", "compile_host", "needs_compiler"]

BUILTINS = Path(__file__).with_name("cuda_builtins.h")
FOLDER = Path(__file__).parents[2] / "build" / "host-kernels"
COMPILER = shutil.which("g++") or shutil.which("c++")
# As on the device: no fused multiply-add, words of any type over any memory, and a fault where a word is not aligned,
# which ends the process.
FLAGS = [
    "-std=c++17",
    "-O1",
    "-shared",
    "-fPIC",
    "-ffp-contract=off",
    "-fno-strict-aliasing",
    "-fsanitize=alignment",
    "-fsanitize-undefined-trap-on-error",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wno-unknown-pragmas",
]
_KERNEL = re.compile(r"^KERNEL (\w+)\(", re.MULTILINE)
_FAILURES = {1: "its threads wait at different places", 2: "the number of arguments is not that of the kernel"}

needs_compiler = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler, g++ or c++")


class HostModule:
    """Kernels of one source and one set of options.

    Launches of one module follow one another, whatever threads they come from.
    """

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        self._lock = threading.Lock()

    def launch(
        self, name: str, grid: tuple[int, ...], block: tuple[int, ...], args: Sequence[object], shared_mem: int = 0
    ) -> None:
        """Run a kernel to its end.

        Args:
            name: What the source calls it.
            grid: Number of blocks, in one dimension.
            block: Number of threads in a block, in one dimension.
            args: Addresses and other numbers: Python's int and float as 8 bytes, NumPy's scalars as what they are,
                NumPy arrays of one element by value.
            shared_mem: 0.
        """
        if np.prod(grid) != grid[0] or np.prod(block) != block[0] or shared_mem:
            raise ValueError(f"{name}: only one dimension and static shared memory, got {grid}, {block}, {shared_mem}")
        kept = [_bytes_of(arg) for arg in args]
        pointers = (ctypes.c_void_p * len(kept))(*[each.ctypes.data for each in kept])
        with self._lock:
            status = getattr(self._library, f"launch_{name}")(grid[0], block[0], pointers, len(kept))
        if status:
            raise RuntimeError(f"{name}: {_FAILURES[status]}")


def _bytes_of(argument: object) -> np.ndarray[Any, Any]:
    if isinstance(argument, bool | int):
        return np.array(argument, np.uint64 if argument > 0 else np.int64)
    if isinstance(argument, float | np.generic):
        return np.array(argument)
    if isinstance(argument, np.ndarray) and argument.size == 1:
        return argument.copy()
    raise TypeError(f"argument: must be a number or an array of one element, got {type(argument).__name__}")


def compile_host(code: str, options: Sequence[str] = ()) -> HostModule:
    """Compile the text of a CUDA source, without `#include`, for the host.

    Args:
        code: What the loader of `mpitrain.memory.device.kernels` gives to NVRTC.
        options: Options of NVRTC; those that define macros count here, too.
    """
    return _compiled(code, tuple(option for option in options if option.startswith("-D")))


@functools.cache
def _compiled(code: str, defines: tuple[str, ...]) -> HostModule:
    launchers = [
        f'extern "C" int launch_{name}(uint32_t grid, uint32_t block, void** arguments, int num_arguments) '
        f"{{ return host::launch({name}, grid, block, arguments, num_arguments); }}"
        for name in _KERNEL.findall(code)
    ]
    text = "\n".join([BUILTINS.read_text(), code, *launchers, ""])
    digest = hashlib.sha256("\0".join([text, *defines, *FLAGS]).encode()).hexdigest()[:32]
    library = FOLDER / f"{digest}.so"
    if not library.exists():
        _build(text, defines, library)
    return HostModule(library)


def _build(text: str, defines: tuple[str, ...], library: Path) -> None:
    if COMPILER is None:
        raise RuntimeError("kernels: no C++ compiler is installed")
    FOLDER.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=FOLDER) as folder:
        made = Path(folder) / "kernel.so"
        command = [COMPILER, *FLAGS, *defines, "-x", "c++", "-", "-o", str(made)]
        done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"kernels: {' '.join(defines)} does not compile\n{done.stderr}")
        # Another process may have made the same meanwhile.
        made.replace(library)
