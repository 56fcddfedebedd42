"""Memory for the arrays of collectives, as a method of the communicator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

from mpitrain.collectives.node_memory import NodeMemory
from mpitrain.memory import NodeArray, SharedArray, as_dtype

__all__ = ["Allocation"]


class Allocation:
    """Allocates arrays; the class that inherits it says from what."""

    _memory: NodeMemory

    @overload
    def allocate(self, shape: int | Sequence[int], dtype: Any) -> SharedArray: ...

    @overload
    def allocate(self, shape: int | Sequence[int], dtype: Any, *, device: Any) -> NodeArray: ...

    def allocate(self, shape: int | Sequence[int], dtype: Any, *, device: Any = None) -> NodeArray:
        """Allocate an array, zero at first, in memory that all ranks of a node map. Every rank must call.

            buffer = comm.allocate((1000, 1000), "float32")
            buffer.numpy()[:] = ...                  # or buffer.tensor()
            comm.allreduce_(buffer)                  # no message is sent within a node

            buffer = comm.allocate((1000, 1000), "float32", device="cuda")
            buffer.cupy()[:] = ...                   # or buffer.tensor()
            comm.allreduce_(buffer)                  # the devices read and write each other's memory

        The memory is given back some time after the array, and all that was made from it, is gone on all ranks.
        Where a node has no shared memory left, or its devices cannot map each other's memory, a warning says so and
        the array is private on all ranks: everything works, more slowly.

        Args:
            shape: Same on every rank.
            dtype: Name, NumPy dtype or torch dtype; same on every rank.
            device: None for memory of the host; "cuda" for that of this rank's device, which may also be named by its
                number, as "cuda:<number>" or as a torch device. Ranks may share a device. If only some ranks name one,
                all arrays are private.

        Returns:
            A `SharedDeviceArray` on a device, else a `SharedArray`.

        Raises:
            UnavailableError: The device cannot be used, on this rank or another one; on every rank.
            MemoryError: The device has no room even for a private array; on this rank.
        """
        self._memory.reclaim()
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        return self._memory.allocate(shape, as_dtype(dtype), device)
