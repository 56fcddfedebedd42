"""Memory that all ranks of a node map: each owns a block and sees the blocks of all others.

The blocks lie in a file in memory that loses its name as soon as every rank has mapped it: nothing stays behind
however the processes end, and each rank gives the memory back by itself, when nothing refers to it any more. (Windows
of MPI are freed by all ranks together, and those that are left over may keep MPI_Finalize waiting for ever.)
"""

from __future__ import annotations

import abc
import math
import mmap
import os
import pathlib
import tempfile
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mpitrain.memory.dtypes import DType

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = [
    "NodeArray",
    "Place",
    "SharedArray",
    "SharedBlock",
    "allocate_mapped",
    "free_shared_nbytes",
    "total_shared_nbytes",
]

# Blocks begin on pages of their own, so that each can lie in memory close to its owner.
_PAGE_NBYTES = 4096
_FOLDER = "/dev/shm"  # noqa: S108  (where Linux keeps shared memory)


class SharedBlock:
    """The blocks of all ranks of a node.

    Args:
        views: Each rank's block as bytes, by rank on the node.
        fence: Full memory barrier: what this rank has written before is seen by whoever sees what it writes after.
            None where that is so by itself.

    Attributes:
        fence: The barrier, a function that does nothing where none is needed.
        needs_fence: Whether it does anything.
    """

    def __init__(self, views: Sequence[NDArray[np.uint8]], fence: Callable[[], None] | None) -> None:
        self.views = list(views)
        self.needs_fence = fence is not None
        self.fence = fence or _nothing

    def typed(self, storage: np.dtype[Any], offset_nbytes: int, count: int) -> list[NDArray[Any]]:
        """Return the same part of every rank's block as arrays of `count` elements."""
        end = offset_nbytes + count * storage.itemsize
        return [view[offset_nbytes:end].view(storage) for view in self.views]


class Place(NamedTuple):
    """Where a shared array lies; equal where it is the same array, and only there.

    Attributes:
        sharers: Stands for the ranks that share it, in their order.
        number: Of the memory; the same on all of these ranks.
        offset_nbytes: From where on.
    """

    sharers: object
    number: int
    offset_nbytes: int

    def __str__(self) -> str:
        """Return it as messages write it."""
        return f"array {self.number} from byte {self.offset_nbytes}"


class NodeArray(abc.ABC):
    """An array of this rank that all ranks of the node can read and write; made by `Communicator.allocate`.

    Args:
        dtype: Element type.
        shape: Same on every rank.
        everybodys: The arrays of all ranks of the node, flat, by rank on the node; only this rank's if it is private.
        index: This rank's place among them.
        place: Where they lie; None if the array is private.
        block: What they are part of, where it is needed besides.
    """

    def __init__(
        self,
        dtype: DType,
        shape: tuple[int, ...],
        everybodys: list[NDArray[Any]],
        index: int,
        place: Place | None,
        *,
        block: Any | None = None,
    ) -> None:
        self.dtype = dtype
        self.shape = shape
        self.everybodys = everybodys
        self._index = index
        self.place = place
        self.block = block

    @property
    def is_shared(self) -> bool:
        """Whether the other ranks of the node map it."""
        return self.place is not None

    @property
    def flat(self) -> NDArray[Any]:
        """This rank's elements, one-dimensional, in storage dtype."""
        return self.everybodys[self._index]

    def part(self, dtype: DType, offset_nbytes: int, count: int) -> Self:
        """Return `count` elements from some byte on as an array of their own over the same memory, on all ranks alike.

        Args:
            dtype: Of the elements.
            offset_nbytes: Multiple of the element's size.
            count: How many fit.
        """
        end = offset_nbytes + count * dtype.itemsize
        parts = [flat.view(np.uint8)[offset_nbytes:end].view(dtype.storage) for flat in self.everybodys]
        place = self.place and self.place._replace(offset_nbytes=self.place.offset_nbytes + offset_nbytes)
        return type(self)(dtype, (count,), parts, self._index, place, block=self.block)

    @property
    @abc.abstractmethod
    def device_name(self) -> str:
        """Where the elements lie: "cpu" or "cuda:<number>"."""

    @abc.abstractmethod
    def new(self, shape: tuple[int, ...]) -> Self:
        """Return an array of the same dtype and in the same kind of memory that only this rank has."""

    @abc.abstractmethod
    def copy(self) -> Self:
        """Return a `new` array with the same contents."""

    @abc.abstractmethod
    def tensor(self) -> Any:
        """Return this rank's array as a torch tensor over the same memory."""

    def _shaped(self, flat: NDArray[Any]) -> NDArray[Any]:
        """Return the elements in the array's shape.

        Raises:
            TypeError: Arrays have no such dtype (bfloat16).
        """
        if flat.dtype.name != self.dtype.name:
            raise TypeError(f"array: NumPy has no dtype {self.dtype}; use tensor()")
        return flat.reshape(self.shape)


class SharedArray(NodeArray):
    """A `NodeArray` in the memory of the host."""

    @classmethod
    def private(cls, dtype: DType, shape: tuple[int, ...]) -> SharedArray:
        """Make an array that only this rank has."""
        return cls(dtype, shape, [np.zeros(math.prod(shape), dtype.storage)], 0, None)

    @property
    def device_name(self) -> str:
        return "cpu"

    def new(self, shape: tuple[int, ...]) -> SharedArray:
        return self.private(self.dtype, shape)

    def copy(self) -> SharedArray:
        made = self.new(self.shape)
        made.flat[:] = self.flat
        return made

    def numpy(self) -> NDArray[Any]:
        """Return this rank's array.

        Raises:
            TypeError: NumPy has no such dtype (bfloat16).
        """
        return self._shaped(self.flat)

    def tensor(self) -> Any:
        import torch

        flat = torch.from_numpy(self.flat)
        return flat.view(getattr(torch, self.dtype.name)).view(self.shape)


def allocate_mapped(
    rank: int, nbytes: int, share: Callable[[Any], list[Any]], fence: Callable[[], None] | None
) -> SharedBlock:
    """Allocate a block of `nbytes` bytes per rank in memory that all ranks map; zero at first.

    Args:
        rank: This rank, among those of `share`.
        nbytes: Size of this rank's block, the same on every rank; at least 1.
        share: Collects a value of each rank on every rank, all of which are on one node; every one must call.
        fence: See `SharedBlock`.

    Raises:
        OSError: The memory is not to be had; on every rank.
    """
    rounded = -(-nbytes // _PAGE_NBYTES) * _PAGE_NBYTES
    path, problem = "", ""
    if rank == 0:
        try:
            descriptor, path = tempfile.mkstemp(prefix="mpitrain-", dir=_FOLDER)
            os.close(descriptor)
        except OSError as error:
            problem = str(error)
    answers = share((path, problem))
    size, (path, problem) = len(answers), answers[0]
    if problem:
        raise OSError(problem)
    mapped = None
    try:
        mapped = _map(path, rank, size, rounded)
    except OSError as error:
        problem = str(error)
    problems = [text for text in share(problem) if text]
    if rank == 0:
        # All have mapped it or never will: from now on it has no name, and goes with the last who maps it.
        pathlib.Path(path).unlink()
    if problems or mapped is None:
        raise OSError(problems[0])
    views = [np.frombuffer(mapped, np.uint8, nbytes, owner * rounded) for owner in range(size)]
    return SharedBlock(views, fence)


def _map(path: str, rank: int, size: int, rounded: int) -> mmap.mmap:
    descriptor = os.open(path, os.O_RDWR)
    try:
        # Each rank reserves its own part, which places it close to the rank. Pages that are not to be had are an error
        # here, and not a signal when they are first touched.
        os.posix_fallocate(descriptor, rank * rounded, rounded)
        if os.fstat(descriptor).st_size < size * rounded:
            os.posix_fallocate(descriptor, size * rounded - 1, 1)
        return mmap.mmap(descriptor, size * rounded)
    finally:
        os.close(descriptor)


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


def _nothing() -> None:
    """Memory is in order already."""
