"""Memory that all ranks of a node map: each owns a block and sees the blocks of all others.

The blocks lie in an MPI shared-memory window, which the MPI libraries unlink as soon as every rank has
mapped it: nothing stays behind however the processes end.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mpitrain.memory.dtypes import DType

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["SharedArray", "SharedBlock", "allocate_window", "free_shared_nbytes"]

# Blocks begin on pages of their own, so that each can lie in memory close to its owner.
_PAGE_NBYTES = 4096
_FOLDER = "/dev/shm"  # noqa: S108  (where MPI libraries keep shared memory on Linux; only asked how full it is)


class SharedBlock:
    """The blocks of all ranks of a node.

    Args:
        views: Each rank's block as bytes, by rank on the node.
        fence: Full memory barrier: what this rank has written before is seen by whoever sees what it writes after.
        free: Gives the memory back; every rank must call, and no view may be used afterwards.
    """

    def __init__(
        self, views: Sequence[NDArray[np.uint8]], fence: Callable[[], None], free: Callable[[], None]
    ) -> None:
        self.views = list(views)
        self.fence = fence
        self._free: Callable[[], None] | None = free

    def free(self) -> None:
        """Give the memory back. Every rank of the node must call; views must not be used any more."""
        free, self._free = self._free, None
        if free is not None:
            self.views = []
            free()

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
        self._block = block

    @classmethod
    def private(cls, dtype: DType, shape: tuple[int, ...]) -> SharedArray:
        """Make an array that only this rank has."""
        return cls(dtype, shape, [np.zeros(math.prod(shape), dtype.storage)], 0, None)

    @property
    def is_shared(self) -> bool:
        """Whether the other ranks of the node map it."""
        return self._block is not None

    @property
    def flat(self) -> NDArray[Any]:
        """This rank's elements, one-dimensional, in storage dtype."""
        return self.everybodys[self._index]

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

    def free(self) -> None:
        """Give the memory back. Every rank must call; arrays and tensors made from it must not be used any more."""
        block, self._block = self._block, None
        self.everybodys = []
        if block is not None:
            block.free()


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
    memories: list[Any] = [window.Shared_query(rank)[0] for rank in range(comm.Get_size())]
    views = [np.frombuffer(memory, np.uint8)[:nbytes] for memory in memories]

    def free() -> None:
        if not MPI.Is_finalized():
            window.Unlock_all()
            window.Free()

    # The owner touches its pages first, which places them.
    views[comm.Get_rank()][:] = 0
    window.Sync()
    comm.Barrier()
    return SharedBlock(views, window.Sync, free)


def free_shared_nbytes() -> int | None:
    """Return how much shared memory this machine can still give; None where that cannot be asked."""
    try:
        state = os.statvfs(_FOLDER)
    except OSError:
        return None
    return state.f_bavail * state.f_frsize
