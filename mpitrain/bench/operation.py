"""One collective on a buffer of one size, as it is timed and checked."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpitrain.bench.pattern import Pattern, count_wrong, fill
from mpitrain.collectives import Communicator
from mpitrain.errors import UnavailableError
from mpitrain.memory import DType, ReduceOp, as_dtype, flat_view, parse_op

__all__ = ["IN_PLACE", "MEMORIES", "REDUCING", "Operation", "Use"]

REDUCING = ("allreduce", "reduce_scatter")
"""Collectives that have an `op`."""

IN_PLACE = ("allreduce", "broadcast")
"""Collectives that can work in place."""

MEMORIES = ("host", "window", "device")
"""Where a buffer lies: ordinary memory, memory from `Communicator.allocate`, memory of a CUDA device."""

# How long the caller looks away from an operation in the background. A thread that looked all the time would
# take the interpreter from the one that does the work.
_AWAY_S = 20e-6


@dataclasses.dataclass(frozen=True)
class Use:
    """How a collective is called.

    Attributes:
        collective: One of `COLLECTIVES`.
        dtype: Of the elements.
        op: How they are reduced; "sum" where they are only moved.
        memory: One of `MEMORIES`; the window not for a form that works on a copy of what was brought.
        in_place: Whether the result replaces what was brought. Else it is a new array.
        persistent: Whether a plan is made once and run; only an all-reduce in place can be.
        blocking: Whether the caller waits in the call.
    """

    collective: str
    dtype: str = "float32"
    op: str = "sum"
    memory: str = "host"
    in_place: bool = False
    persistent: bool = False
    blocking: bool = True

    def __post_init__(self) -> None:
        """Check that there is such a use.

        Raises:
            ValueError: There is none.
        """
        if self.in_place and self.collective not in IN_PLACE:
            raise ValueError(f"in place: only {' and '.join(IN_PLACE)} have that form, got {self.collective}")
        if self.memory == "window" and self.collective in IN_PLACE and not self.in_place:
            raise ValueError(f"window memory: only for the form in place, got {self.collective} out of place")
        if self.persistent and not (self.collective == "allreduce" and self.in_place and self.blocking):
            raise ValueError(f"persistent: only for a blocking allreduce in place, got {self.collective}")


class Operation:
    """A buffer, and the calls that work on it. Every rank must make it.

    Args:
        comm: Of the ranks.
        use: How it is called.
        nbytes: Size of the full buffer; rounded down to whole elements, the same number of them on each rank, and at
            least one.

    Attributes:
        nbytes: The size that it became.
        array: What this rank brings.

    Raises:
        UnavailableError: No such memory here; on every rank.
    """

    def __init__(self, comm: Communicator, use: Use, nbytes: int) -> None:
        self.comm = comm
        self.use = use
        self.dtype = as_dtype(use.dtype)
        self.op = parse_op(use.op) if use.collective in REDUCING else ReduceOp.SUM
        count = max(1, nbytes // self.dtype.itemsize)
        if use.collective in ("allgather", "reduce_scatter", "alltoall"):
            self.part_count = max(1, count // comm.size)
            count = self.part_count * comm.size
        else:
            self.part_count = count
        self.count = count
        self.nbytes = count * self.dtype.itemsize
        self.array = self._allocate(self.part_count if use.collective == "allgather" else count)
        # Written, so that it has memory of its own.
        self.clear()

    def _allocate(self, count: int) -> Any:
        if self.use.memory == "window":
            array = self.comm.allocate(count, self.dtype)
            if not array.is_shared:
                raise UnavailableError(f"window of {self.nbytes} bytes: the node has no such memory to share")
            return array
        if self.use.memory == "device" or self.dtype.name == "bfloat16":
            return _torch_array(count, self.dtype, is_device=self.use.memory == "device")
        return np.empty(count, self.dtype.storage)

    def clear(self) -> None:
        """Fill the buffer with zeros, which stay zeros however often they are reduced."""
        self._write(np.zeros(1, self.dtype.storage))

    def call(self, algorithm: str) -> Callable[[], Any]:
        """Return a function that makes one call and returns the result.

        Raises:
            ValueError: No such algorithm.
        """
        use, array = self.use, self.array
        options: dict[str, Any] = {"algorithm": algorithm}
        if use.collective in REDUCING:
            options["op"] = use.op
        if use.persistent:
            return self.comm.plan_allreduce_(array, **options).run
        run = getattr(self.comm, use.collective + ("" if use.blocking else "_async") + ("_" if use.in_place else ""))
        if not use.blocking:
            return lambda: _wait(run(array, **options))
        if use.collective == "alltoall":
            return lambda: run(array, **options)[0]
        return lambda: run(array, **options)

    def count_wrong(self, call: Callable[[], Any]) -> int:
        """Bring known values, make a call, and return how many elements of all ranks' results are wrong.

        Every rank must call; the answer is the same on all.
        """
        comm, collective = self.comm, self.use.collective
        pattern = Pattern(self.dtype, self.op, comm.size)
        if collective == "alltoall":
            self._write(*(pattern.brought(comm.rank * comm.size + dest) for dest in range(comm.size)))
        else:
            self._write(pattern.brought(comm.rank))
        result = self._read(call())
        if collective in ("allgather", "alltoall"):
            sent = [
                source if collective == "allgather" else source * comm.size + comm.rank for source in range(comm.size)
            ]
            parts = result.reshape(comm.size, self.part_count)
            wrong = sum(count_wrong(part, pattern.brought(number)) for part, number in zip(parts, sent, strict=True))
        elif collective == "broadcast":
            wrong = count_wrong(result, pattern.brought(0))
        else:
            first = comm.rank * self.part_count if collective == "reduce_scatter" else 0
            wrong = count_wrong(result, pattern.reduced(), first)
        return int(comm.allreduce(np.array([wrong]))[0])

    def _write(self, *periods: NDArray[Any]) -> None:
        """Fill the buffer, or as many equal parts of it as there are patterns."""
        host = self._host_view(self.array)
        target = np.empty(self.array.numel(), self.dtype.storage) if host is None else host
        for part, period in zip(target.reshape(len(periods), -1), periods, strict=True):
            fill(part, period)
        if host is None:
            import torch

            self.array.copy_(torch.from_numpy(target).view(self.array.dtype))

    def _read(self, result: Any) -> NDArray[Any]:
        host = self._host_view(result)
        return flat_view(result.cpu()).data if host is None else host

    def _host_view(self, array: Any) -> NDArray[Any] | None:
        return None if self.use.memory == "device" else flat_view(array, writable=True).data


def _torch_array(count: int, dtype: DType, *, is_device: bool) -> Any:
    try:
        import torch
    except ImportError as error:
        what = "device memory" if is_device else str(dtype)
        raise UnavailableError(f"{what}: needs torch, got {error}; pip install mpitrain[torch]") from error
    if is_device and not torch.cuda.is_available():
        raise UnavailableError("device memory: needs a CUDA device that torch can use, found none; use --memory host")
    return torch.empty(count, dtype=getattr(torch, dtype.name), device="cuda" if is_device else "cpu")


def _wait(handle: Any) -> Any:
    while not handle.done:
        time.sleep(_AWAY_S)
    return handle.wait()
