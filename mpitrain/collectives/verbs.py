"""The collectives as methods, blocking and asynchronous."""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np

from mpitrain.collectives import operations
from mpitrain.collectives.plan import Plan
from mpitrain.collectives.progress import Handle
from mpitrain.collectives.quick import Quick
from mpitrain.collectives.quick_calls import QuickCalls
from mpitrain.memory import ReduceOp

__all__ = ["Collectives"]

Result = TypeVar("Result")

# At hand, as it is looked up in each call.
_ndarray = np.ndarray


class Collectives(abc.ABC):
    """Every collective in its forms; the class that inherits them says how a plan is run.

    What holds for all of them. `array` is a NumPy or CuPy array or a torch tensor, on the host or
    on this rank's device, contiguous; ranks may differ in that. `op` is "sum", "average",
    "min", "max" or "product", and for all-reduces also "adasum". `algorithm` is a name of the registry of schedules,
    "native" for the MPI library's own collective, or "auto". `root`, `op`, `algorithm`, dtype and (unless said
    otherwise) shape must be the same on every rank. Results are new arrays of the same library and dtype, except for
    names that end in `_`.

    Raises, in all of them:
        ValueError, TypeError: A bad argument, on the rank that brought it; the others raise a
            `CollectiveMismatchError`, if not for a bad argument of their own.
        CollectiveMismatchError: Ranks brought different things; raised on all of them, nothing was changed.
        CommError: The messages could not be exchanged; the communicator is given up on all ranks, and the
            contents of the arrays that were to be written are undefined.
    """

    _quick: QuickCalls
    # What is looked up in each call lies at hand.
    _quick_arrays: dict[Any, Quick]
    _quick_arrays_in_place: dict[Any, Quick]

    @abc.abstractmethod
    def _run(self, make_plan: Callable[..., Plan[Result]], *arguments: Any, **options: Any) -> Result:
        """Make a plan and run it to its end."""

    @abc.abstractmethod
    def _start(self, make_plan: Callable[..., Plan[Result]], *arguments: Any, **options: Any) -> Handle[Result]:
        """Make a plan and start it."""

    def allreduce(
        self,
        array: Any,
        *,
        op: str | ReduceOp = "sum",
        algorithm: str = "auto",
        parts: Sequence[int] | None = None,
    ) -> Any:
        """Reduce the arrays of all ranks; every rank returns the result.

        `parts` is for "adasum", which does not work element by element: counts of the vectors that `array` holds one
        after another, each of which is combined by itself. Same on every rank.
        """
        if parts is None:
            if type(array) is _ndarray:
                try:
                    quick = self._quick_arrays[array.dtype, array.shape, op, algorithm]
                except (KeyError, TypeError):
                    pass
                else:
                    result = quick.run(array)  # it is copied, so it may lie as it likes
                    if result is not None:
                        return result
            else:
                result = self._quick.reduced(array, op, algorithm)
                if result is not None:
                    return result
        return self._run(operations.plan_allreduce, array, op=op, algorithm=algorithm, parts=parts)

    def allreduce_(
        self,
        array: Any,
        *,
        op: str | ReduceOp = "sum",
        algorithm: str = "auto",
        parts: Sequence[int] | None = None,
    ) -> Any:
        """Reduce the arrays of all ranks in place; every rank returns its own `array`. See `allreduce`."""
        if parts is None:
            if type(array) is _ndarray:
                try:
                    quick = self._quick_arrays_in_place[array.dtype, array.shape, op, algorithm]
                except (KeyError, TypeError):
                    pass
                else:
                    if array.flags.carray:
                        return quick.run(array, array)
            elif self._quick.reduce(array, op, algorithm):
                return array
        return self._run(operations.plan_allreduce, array, op=op, algorithm=algorithm, parts=parts, in_place=True)

    def allreduce_async(self, array: Any, **options: Any) -> Handle[Any]:
        """Start an `allreduce`, with its options."""
        return self._start(operations.plan_allreduce, array, **options)

    def allreduce_async_(self, array: Any, **options: Any) -> Handle[Any]:
        """Start an `allreduce_`, with its options."""
        return self._start(operations.plan_allreduce, array, in_place=True, **options)

    def reduce(self, array: Any, *, root: int = 0, op: str | ReduceOp = "sum", algorithm: str = "auto") -> Any:
        """Reduce the arrays of all ranks; the root returns the result, the others None."""
        return self._run(operations.plan_reduce, array, root=root, op=op, algorithm=algorithm)

    def reduce_async(self, array: Any, **options: Any) -> Handle[Any]:
        """Start a `reduce`, with its options."""
        return self._start(operations.plan_reduce, array, **options)

    def reduce_scatter(self, array: Any, *, op: str | ReduceOp = "sum", algorithm: str = "auto") -> Any:
        """Reduce the arrays of all ranks; rank r returns the r-th part along the first dimension.

        Where the first dimension does not divide, the first ranks get one row more.
        """
        return self._run(operations.plan_reduce_scatter, array, op=op, algorithm=algorithm)

    def reduce_scatter_async(self, array: Any, **options: Any) -> Handle[Any]:
        """Start a `reduce_scatter`, with its options."""
        return self._start(operations.plan_reduce_scatter, array, **options)

    def allgather(self, array: Any, *, rows: Sequence[int] | None = None, algorithm: str = "auto") -> Any:
        """Collect the arrays of all ranks; every rank returns them one after another along the first dimension.

        `rows` lists the first dimensions of all ranks' arrays where they differ. An array of shape `()` is one row.
        """
        return self._run(operations.plan_allgather, array, rows=rows, algorithm=algorithm)

    def allgather_async(self, array: Any, **options: Any) -> Handle[Any]:
        """Start an `allgather`, with its options."""
        return self._start(operations.plan_allgather, array, **options)

    def broadcast(self, array: Any, *, root: int = 0, algorithm: str = "auto") -> Any:
        """Copy the root's array; every rank returns a new one."""
        return self._run(operations.plan_broadcast, array, root=root, algorithm=algorithm)

    def broadcast_(self, array: Any, *, root: int = 0, algorithm: str = "auto") -> Any:
        """Copy the root's array into the arrays of all others; every rank returns its own `array`."""
        return self._run(operations.plan_broadcast, array, root=root, algorithm=algorithm, in_place=True)

    def broadcast_async(self, array: Any, **options: Any) -> Handle[Any]:
        """Start a `broadcast`, with its options."""
        return self._start(operations.plan_broadcast, array, **options)

    def broadcast_async_(self, array: Any, **options: Any) -> Handle[Any]:
        """Start a `broadcast_`, with its options."""
        return self._start(operations.plan_broadcast, array, in_place=True, **options)

    def gather(self, array: Any, *, root: int = 0, algorithm: str = "auto") -> Any:
        """Collect the arrays of all ranks; the root returns them one after another, the others None."""
        return self._run(operations.plan_gather, array, root=root, algorithm=algorithm)

    def gather_async(self, array: Any, **options: Any) -> Handle[Any]:
        """Start a `gather`, with its options."""
        return self._start(operations.plan_gather, array, **options)

    def scatter(self, array: Any, out: Any, *, root: int = 0, algorithm: str = "auto") -> Any:
        """Cut the root's `array` into `size` parts; every rank returns its own `out`, which holds its part.

        `array` holds `size` times the elements of `out` on the root, and is ignored (pass None) elsewhere.
        """
        return self._run(operations.plan_scatter, array, out, root=root, algorithm=algorithm)

    def scatter_async(self, array: Any, out: Any, **options: Any) -> Handle[Any]:
        """Start a `scatter`, with its options."""
        return self._start(operations.plan_scatter, array, out, **options)

    def alltoall(
        self, array: Any, *, splits: Sequence[int] | None = None, algorithm: str = "auto"
    ) -> tuple[Any, list[int]]:
        """Send one part of `array` to each rank; return what came from all, in rank order, and rows by source.

        `splits` lists how many rows go to each rank; all ranks pass it or none does, and the first dimension
        is then cut evenly. First dimensions may differ.
        """
        return self._run(operations.plan_alltoall, array, splits=splits, algorithm=algorithm)

    def alltoall_async(self, array: Any, **options: Any) -> Handle[tuple[Any, list[int]]]:
        """Start an `alltoall`, with its options."""
        return self._start(operations.plan_alltoall, array, **options)

    def barrier(self, *, algorithm: str = "auto") -> None:
        """Return when all ranks have called."""
        self._run(operations.plan_barrier, algorithm=algorithm)

    def barrier_async(self, **options: Any) -> Handle[None]:
        """Start a `barrier`, with its options."""
        return self._start(operations.plan_barrier, **options)
