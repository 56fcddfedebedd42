"""Memory that all ranks of a node map: each owns a block and sees the blocks of all others.

The blocks lie in an MPI shared-memory window, which the MPI libraries unlink as soon as every rank has
mapped it: nothing stays behind however the processes end.
"""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mpitrain.memory.dtypes import DType

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["SharedArray", "SharedBlock", "allocate_window", "free_shared_nbytes", "total_shared_nbytes"]

# Blocks begin on pages of their own, so that each can lie in memory close to its owner.
_PAGE_NBYTES = 4096
_FOLDER = "/dev/shm"  # noqa: S108  (where MPI libraries keep shared memory on Linux; only asked how full it is)


class SharedBlock:
    """The blocks of all ranks of a node.

    Args:
        views: Each rank's block as bytes, by rank on the node.
        owner: What this rank's view and all that is made from it keeps alive.
        fence: Full memory barrier: what this rank has written before is seen by whoever sees what it writes after.
        release: Gives the memory back; every rank of the node must call, when no view is used any more. Further calls
            do nothing. It does not keep the block alive.
    """

    def __init__(
        self,
        views: Sequence[NDArray[np.uint8]],
        owner: object,
        fence: Callable[[], None],
        release: Callable[[], None],
    ) -> None:
        self.views = list(views)
        self.owner = owner
        self.fence = fence
        self.release = release

    def typed(self, storage: np.dtype[Any], offset_nbytes: int, count: int) -> list[NDArray[Any]]:
        """Return the same part of every rank's block as arrays of `count` elements."""
        end = offset_nbytes + count * storage.itemsize
        return [view[offset_nbytes:end].view(storage) for view in self.views]


class SharedArray:
    """An array of this rank that all ranks of the node can read and write; made by `Communicator.allocate`.

    Args:
        dtype: Element type.
        shape: Same on every rank.
        everybodys: The arrays of all ranks of the node, flat, by rank on the node; only this rank's if it is private.
        index: This rank's place among them.
        block: What they lie in; None if the array is private.
    """

    def __init__(
        self,
        dtype: DType,
        shape: tuple[int, ...],
        everybodys: list[NDArray[Any]],
        index: int,
        block: SharedBlock | None,
    ) -> None:
        self.dtype = dtype
        self.shape = shape
        self.everybodys = everybodys
        self._index = index
        self.block = block

    @classmethod
    def private(cls, dtype: DType, shape: tuple[int, ...]) -> SharedArray:
        """Make an array that only this rank has."""
        return cls(dtype, shape, [np.zeros(math.prod(shape), dtype.storage)], 0, None)

    @property
    def is_shared(self) -> bool:
        """Whether the other ranks of the node map it."""
        return self.block is not None

    @property
    def flat(self) -> NDArray[Any]:
        """This rank's elements, one-dimensional, in storage dtype."""
        return self.everybodys[self._index]

    def part(self, dtype: DType, offset_nbytes: int, count: int) -> SharedArray:
        """Return `count` elements from some byte on as an array of their own over the same memory, on all ranks alike.

        Args:
            dtype: Of the elements.
            offset_nbytes: Multiple of the element's size.
            count: How many fit.
        """
        end = offset_nbytes + count * dtype.itemsize
        parts = [flat.view(np.uint8)[offset_nbytes:end].view(dtype.storage) for flat in self.everybodys]
        return SharedArray(dtype, (count,), parts, self._index, self.block)

    def numpy(self) -> NDArray[Any]:
        """Return this rank's array.

        Raises:
            TypeError: NumPy has no such dtype (bfloat16).
        """
        if self.flat.dtype.name != self.dtype.name:
            raise TypeError(f"array: NumPy has no dtype {self.dtype}; use tensor()")
        return self.flat.reshape(self.shape)

    def tensor(self) -> Any:
        """Return this rank's array as a torch tensor over the same memory."""
        import torch

        flat = torch.from_numpy(self.flat)
        return flat.view(getattr(torch, self.dtype.name)).view(self.shape)


def allocate_window(comm: MPI.Intracomm, nbytes: int) -> SharedBlock:
    """Allocate a block of `nbytes` bytes per rank in a shared-memory window.

    Args:
        comm: Ranks that share memory; every one of them must call.
        nbytes: Size of this rank's block, the same on every rank; at least 1.

    Raises:
        MPI.Exception: The MPI library cannot share memory.
    """
    from mpi4py import MPI

    info = MPI.Info.Create()
    info.Set("alloc_shared_noncontig", "true")
    rounded = -(-nbytes // _PAGE_NBYTES) * _PAGE_NBYTES
    window = MPI.Win.Allocate_shared(rounded, 1, info, comm)
    info.Free()
    # Loads and stores need an access epoch; one that lasts for as long as the window does.
    window.Lock_all(MPI.MODE_NOCHECK)
    exporters = [_exporter(window.Shared_query(rank)[0], nbytes) for rank in range(comm.Get_size())]
    views = [np.frombuffer(exporter, np.uint8) for exporter in exporters]
    fence = window.Sync
    held = [window]

    def release() -> None:
        if held and not MPI.Is_finalized():
            window = held.pop()
            window.Unlock_all()
            window.Free()

    # The owner touches its pages first, which places them.
    views[comm.Get_rank()][:] = 0
    fence()
    comm.Barrier()
    return SharedBlock(views, exporters[comm.Get_rank()], fence, release)


def _exporter(memory: Any, nbytes: int) -> Any:
    """Return an object over the memory that arrays keep alive, and whose end can be noticed."""
    return (ctypes.c_ubyte * nbytes).from_buffer(memory)


def free_shared_nbytes() -> int | None:
    """Return how much shared memory this machine can still give; None where that cannot be asked."""
    state = _state()
    return None if state is None else state.f_bavail * state.f_frsize


def total_shared_nbytes() -> int | None:
    """Return how much shared memory this machine has in all; None where that cannot be asked."""
    state = _state()
    return None if state is None else state.f_blocks * state.f_frsize


def _state() -> os.statvfs_result | None:
    try:
        return os.statvfs(_FOLDER)
    except OSError:
        return None
