"""Finds the sources of the kernels, has CuPy compile them with NVRTC, and launches them.

A kernel is compiled once for each device and set of macros, when it is first launched; CuPy keeps what it has compiled
on disk, for later processes. Sources include one another but nothing of CUDA's, so NVRTC is all that it takes.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from mpitrain.errors import UnavailableError
from mpitrain.memory.device.kernels.nvrtc import preload_nvrtc
from mpitrain.memory.device.library import CupyModule, explained, load_cupy
from mpitrain.memory.device.streams import Stream

__all__ = [
    "THREADS",
    "TILE",
    "Array",
    "Variant",
    "address_of",
    "common_head",
    "launch",
    "num_blocks_for",
    "source_text",
]

THREADS = 256
"""Threads of a block; as many as an SM holds are eight blocks, or six where these are 1536."""

TILE = 4096
"""Elements of a tile, where a kernel works by tiles: 16 for each thread."""

Array: TypeAlias = Any
"""An address in device memory, as int, or a contiguous CuPy array."""

# More would wait for these to end; as many as fit at once go over the arrays in strides.
_BLOCKS_PER_SM = 8
# Sums and products keep their bits if none of them is fused, as on the host.
_OPTIONS = ("-std=c++17", "--fmad=false", f"-DTHREADS={THREADS}", f"-DTILE={TILE}")
_INCLUDE = re.compile(r'^#include "([a-z_]+\.cuh)"\n', re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Variant:
    """One source with the macros that it is compiled with.

    Attributes:
        source: Name of the file in `kernels/`, without `.cu`.
        macros: Names and values.
    """

    source: str
    macros: tuple[tuple[str, str | int], ...]

    @property
    def options(self) -> tuple[str, ...]:
        """Options of NVRTC, but for the architecture."""
        return (*_OPTIONS, *(f"-D{name}={value}" for name, value in self.macros))

    def __str__(self) -> str:
        return " ".join([self.source, *(f"{name}={value}" for name, value in self.macros)])


@functools.cache
def source_text(source: str) -> str:
    """Return a CUDA source with what it includes put in its place.

    CuPy knows what it has compiled before by this text, so a change of an included file must change it, too.

    Raises:
        UnavailableError: This installation has no sources of kernels.
    """
    folder = _folder()
    included = set()

    def include(match: re.Match[str]) -> str:
        name = match[1]
        if name in included:
            return ""
        included.add(name)
        return _INCLUDE.sub(include, (folder / name).read_text(encoding="utf-8"))

    return _INCLUDE.sub(include, (folder / f"{source}.cu").read_text(encoding="utf-8"))


def _folder() -> Path:
    package = Path(__file__).parents[3]
    # A wheel has its sources inside; an editable installation is beside them.
    folders = [package / "_kernels", package.parent / "kernels"]
    for folder in folders:
        if (folder / "elements.cuh").is_file():
            return folder
    raise UnavailableError(
        f"kernels: their sources are missing, got neither {folders[0]} nor {folders[1]}; install mpitrain again"
    )


def launch(
    variant: Variant, kernel: str, num_blocks: int, arguments: Sequence[object], stream: Stream | None = None
) -> None:
    """Queue one kernel on the current device.

    Args:
        variant: What to compile, if this device has not had it yet.
        kernel: Name of the function in the source.
        num_blocks: Blocks of `THREADS` threads.
        arguments: Addresses as int, other numbers as NumPy scalars, structures as NumPy arrays of one element.
        stream: A CuPy stream of the current device; the current one without.

    Raises:
        UnavailableError: CuPy, the driver or NVRTC are missing, or the source does not compile for this device.
    """
    cupy = load_cupy("kernels")
    try:
        device = cupy.cuda.runtime.getDevice()
        with contextlib.nullcontext() if stream is None else stream:
            _function(cupy, device, variant, kernel)((num_blocks,), (THREADS,), tuple(arguments))
    except Exception:
        # Only now, as a launch should take little time.
        with explained("kernels"), _compiling(cupy, variant):
            raise


@functools.cache
def _function(cupy: CupyModule, device: int, variant: Variant, kernel: str) -> Any:
    # The device is part of the key: a compiled kernel belongs to the one that was current.
    return _module(cupy, device, variant).get_function(kernel)


@functools.cache
def _module(cupy: CupyModule, device: int, variant: Variant) -> Any:  # noqa: ARG001 (a key, as above)
    preload_nvrtc(cupy)
    return cupy.RawModule(code=source_text(variant.source), options=variant.options)


@contextlib.contextmanager
def _compiling(cupy: CupyModule, variant: Variant) -> Iterator[None]:
    """Explain what fails when a kernel is compiled, which CuPy does in its first launch."""
    try:
        yield
    except cupy.cuda.compiler.CompileException as error:
        raise UnavailableError(
            f"kernels: {variant} does not compile for this device with CuPy {cupy.__version__}, got {error}; "
            f"mpitrain needs compute capability 7.0 or newer and NVRTC of CUDA 12 or 13"
        ) from error
    except (RuntimeError, OSError) as error:
        if "nvrtc" not in str(error).lower():
            raise
        raise UnavailableError(
            f"kernels: {variant} cannot be compiled, as CuPy {cupy.__version__} does not find NVRTC, got {error}; "
            f"install nvidia-cuda-nvrtc-cu12 for cupy-cuda12x, or nvidia-cuda-nvrtc for cupy-cuda13x"
        ) from error


def num_blocks_for(num_threads: int, most_blocks: int | None = None) -> int:
    """Return how many blocks to launch on the current device for so many threads' work.

    Args:
        num_threads: At least 1.
        most_blocks: Fewer than fit, to leave room for what else the device does.
    """
    runtime = load_cupy("kernels").cuda.runtime
    limit = _num_multiprocessors(runtime, runtime.getDevice()) * _BLOCKS_PER_SM
    return max(1, min(-(-num_threads // THREADS), limit if most_blocks is None else min(limit, most_blocks)))


@functools.cache
def _num_multiprocessors(runtime: Any, device: int) -> int:
    return int(runtime.deviceGetAttribute(runtime.cudaDevAttrMultiProcessorCount, device))


def address_of(array: Array) -> int:
    """Return the address of an array's first element."""
    return array if isinstance(array, int) else int(array.data.ptr)


def common_head(arrays: Sequence[tuple[int, int]], group_count: int, count: int) -> int:
    """Return the first element from which on groups of all arrays are aligned, `count` if there is none.

    Args:
        arrays: Address and size of an element in bytes, for each.
        group_count: Elements in a group. A group is aligned to its size, or to 16 bytes if that is less.
        count: Elements of each array.
    """
    for head in range(group_count):
        if all((address + head * itemsize) % min(16, group_count * itemsize) == 0 for address, itemsize in arrays):
            return min(head, count)
    return count
