"""Memory of other processes of this host, read by the kernel's cross memory attach (CMA), as MPI libraries do.

One system call copies from where the bytes lie to where they are needed. Through memory that both processes map it
would be two copies, and work for both of them.

The kernel allows it where one process may trace the other. Containers may forbid it, and have processes whose numbers
others do not know, so it is tried before it is relied on. Where the Linux module Yama restricts tracing to descendants
(`ptrace_scope` is 1), a process can permit it, and does so here as in Open MPI: any process of the same user can read
it then, as is usual without Yama.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mpitrain.errors import CommError

__all__ = ["CrossMemory", "Sample", "address_of", "can_read", "make_sample"]

_TOKEN_NBYTES = 16
_YAMA = Path("/proc/sys/kernel/yama/ptrace_scope")
_RESTRICTED = "1"
# Of prctl(2); the second is any process.
_SET_PTRACER, _ANY = 0x59616D61, -1


class Sample(NamedTuple):
    """What a process lets others try to read.

    Attributes:
        pid: Of the process.
        address: Of its token.
        token: What lies there, a random number, so that another process is not taken for this one.
    """

    pid: int
    address: int
    token: bytes


class CrossMemory:
    """Reads the memory of some processes.

    Args:
        pids: Of these, by rank on the node.
    """

    def __init__(self, pids: Sequence[int]) -> None:
        self._pids = list(pids)

    def read(self, rank: int, source: int, target: int, nbytes: int) -> None:
        """Copy so many bytes from an address of a rank's process to one of this process.

        Raises:
            CommError: There is no such process, or no such memory.
        """
        _read(self._pids[rank], source, target, nbytes, f"rank {rank} of this node")

    @staticmethod
    def readable_address(array: NDArray[Any]) -> int:
        """Return the address at which others can read an array, which is contiguous and not empty.

        0 if they cannot: memory of some devices has no pages that the kernel could look up.
        """
        address = address_of(array)
        # One call of the kernel: the first byte and the last, one after the other.
        there = _Spans(address, 1, address + array.nbytes - 1, 1)
        found = _Spans()
        here = _Spans(ctypes.addressof(found), 2)
        function = _function()
        return address if function and function(os.getpid(), here, 1, there, 2, 0) == here[1] else 0


def can_read(samples: Sequence[Sample]) -> bool:
    """Tell whether this process can read all these samples. Never raises."""
    found = np.empty(_TOKEN_NBYTES, np.uint8)
    with contextlib.suppress(CommError):
        for sample in samples:
            _read(sample.pid, sample.address, address_of(found), _TOKEN_NBYTES, "sample")
            if found.tobytes() != sample.token:
                return False
        return True
    return False


def make_sample() -> Sample:
    """Return the sample of this process, and permit others to read it if they have to be permitted."""
    with contextlib.suppress(OSError, AttributeError):
        if _YAMA.read_text(encoding="ascii").strip() == _RESTRICTED:
            ctypes.CDLL(None).prctl(_SET_PTRACER, ctypes.c_ulong(_ANY), 0, 0, 0)
    pid = os.getpid()
    token = _tokens.get(pid)
    if token is None:
        token = _tokens[pid] = np.frombuffer(os.urandom(_TOKEN_NBYTES), np.uint8)
    return Sample(pid, address_of(token), token.tobytes())


# What samples point to lives as long as the process. One that was forked has a number, and a token, of its own.
_tokens: dict[int, NDArray[np.uint8]] = {}


def address_of(array: NDArray[Any]) -> int:
    """Return where the first element of an array lies."""
    return int(array.__array_interface__["data"][0])


# Address and length of each of two spans of memory; the kernel knows the two as an `iovec`.
_Spans = ctypes.c_size_t * 4


@functools.cache
def _function() -> Callable[..., int] | None:
    """Return `process_vm_readv` of the C library; None on systems without it."""
    try:
        function = ctypes.CDLL(None, use_errno=True).process_vm_readv
    except (OSError, AttributeError):
        return None
    function.argtypes = (ctypes.c_int, _Spans, ctypes.c_ulong, _Spans, ctypes.c_ulong, ctypes.c_ulong)
    function.restype = ctypes.c_ssize_t
    return function


def _read(pid: int, source: int, target: int, nbytes: int, whom: str) -> None:
    function = _function()
    if function is None:
        raise CommError(f"memory of {whom}: cannot be read, as this system has no cross memory attach")
    while nbytes:
        # The kernel reads no more than 2 GiB at once, and stops where memory ends.
        count = function(pid, _Spans(target, nbytes), 1, _Spans(source, nbytes), 1, 0)
        if count <= 0:
            problem = os.strerror(ctypes.get_errno()) if count < 0 else "nothing was read"
            raise CommError(
                f"memory of {whom}: cannot be read ({problem}); it may have ended, else set MPITRAIN_CROSS_MEMORY=0"
            )
        source, target, nbytes = source + count, target + count, nbytes - count
