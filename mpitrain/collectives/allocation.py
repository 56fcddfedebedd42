"""Memory for the arrays of collectives, as a method of the communicator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

from mpitrain.collectives.context import Context
from mpitrain.collectives.node_memory import NodeMemory
from mpitrain.collectives.plan import Plan, empty_plan
from mpitrain.collectives.verbs import Collectives
from mpitrain.memory import NodeArray, SharedArray, as_dtype

__all__ = ["Allocation"]


class Allocation(Collectives):
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

        Operations of this communicator and its duplicates take it from where it lies, if all ranks pass the same one;
        that ranks pass different ones is an error. To any other communicator it is an ordinary array. The memory is
        given back some time after the array, and all that was made from it, is gone on all ranks.
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
            ValueError, TypeError: Bad argument, on the rank that brought it.
            CollectiveMismatchError: Ranks brought different things, or bad ones; on all others.
            UnavailableError: The device cannot be used, on this rank or another one; on every rank.
            MemoryError: No room even for a private array, on the rank that has none; `CollectiveError` on the others.
        """
        self._run(_plan_allocation, shape, dtype)
        self._memory.reclaim()
        return self._memory.allocate(_lengths_of(shape), as_dtype(dtype), device)


def _plan_allocation(_context: Context, shape: int | Sequence[int], dtype: Any) -> Plan[None]:
    """Prepare nothing but the check of the arguments, which are the same on all ranks.

    Raises:
        ValueError, TypeError: Bad argument.
    """
    return empty_plan(f"allocation of {as_dtype(dtype)} {list(_lengths_of(shape))}")


def _lengths_of(shape: int | Sequence[int]) -> tuple[int, ...]:
    lengths = (shape,) if isinstance(shape, int) else tuple(shape)
    if not all(isinstance(length, int) for length in lengths):
        raise TypeError(f"shape: must be whole numbers, got {shape!r}; convert them")
    if any(length < 0 for length in lengths):
        raise ValueError(f"shape: must not be negative, got {shape!r}; use numbers from 0 on")
    return lengths
