"""NVRTC without CuPy and without a GPU: the library of the wheel `nvidia-cuda-nvrtc`, called as it is."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from collections.abc import Sequence
from pathlib import Path

__all__ = ["compile_for", "find_nvrtc"]


@functools.cache
def find_nvrtc() -> Path | None:
    """Return the library of the installed wheel, None if there is none."""
    spec = importlib.util.find_spec("nvidia")
    folders = [] if spec is None else spec.submodule_search_locations or []
    found = [path for folder in folders for path in Path(folder).glob("*/lib/libnvrtc.so.*") if "alt" not in path.name]
    return max(found, default=None)


@functools.cache
def _nvrtc() -> ctypes.CDLL:
    library = find_nvrtc()
    assert library is not None
    return ctypes.CDLL(str(library))


def _call(function: str, *arguments: object) -> None:
    status = getattr(_nvrtc(), function)(*arguments)
    assert status == 0, f"{function}: NVRTC's status {status}"


def compile_for(architecture: str, code: str, options: Sequence[str]) -> tuple[bytes, str]:
    """Compile a CUDA source to machine code.

    Args:
        architecture: Such as `"sm_90"`.
        code: The source, without `#include`.
        options: Other options of NVRTC.

    Returns:
        The machine code, empty if the source does not compile, and what the compiler said.
    """
    program = ctypes.c_void_p()
    _call("nvrtcCreateProgram", ctypes.byref(program), code.encode(), b"kernels.cu", 0, None, None)
    try:
        given = [option.encode() for option in (*options, f"--gpu-architecture={architecture}")]
        status = _nvrtc().nvrtcCompileProgram(program, len(given), (ctypes.c_char_p * len(given))(*given))
        log = _bytes_of(program, "ProgramLog").decode().rstrip("\0")
        return (b"" if status else _bytes_of(program, "CUBIN")), log
    finally:
        _call("nvrtcDestroyProgram", ctypes.byref(program))


def _bytes_of(program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    _call(f"nvrtcGet{what}Size", program, ctypes.byref(size))
    contents = ctypes.create_string_buffer(size.value)
    _call(f"nvrtcGet{what}", program, contents)
    return contents.raw
