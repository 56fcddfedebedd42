"""Collectives whose device memory goes straight to an MPI library that is CUDA-aware.

They are those of the host, on another context: messages leave from and land in device memory, what is received is
reduced by a kernel, and MPI, which knows nothing of streams, is called when the events before it are done. Only
schedules, and those collectives of the library that reduce nothing: what it reduces it takes to the host.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

from numpy.typing import NDArray

from mpitrain.collectives import operations
from mpitrain.collectives.context import Context
from mpitrain.collectives.executor import Run, Task
from mpitrain.collectives.gate import Finish
from mpitrain.collectives.plan import STRAIGHT, Call, Plan
from mpitrain.collectives.program import Program
from mpitrain.collectives.selection import DIRECT, HIERARCHICAL, NATIVE
from mpitrain.comm import Request
from mpitrain.memory import DType, ReduceOp, ScratchPool, allocate_like, is_on_device
from mpitrain.memory.device import CallersStream, Event, Streams, empty, is_done, load_cupy, streams_of
from mpitrain.memory.device.kernels import reduce_peers
from mpitrain.memory.dtypes import dtype_named

__all__ = ["goes_straight", "plan_straight"]

_REDUCING = (operations.plan_allreduce, operations.plan_reduce, operations.plan_reduce_scatter)
_BYTES = dtype_named("uint8")


def goes_straight(context: Context, make_plan: Callable[..., Plan[Any]], options: dict[str, Any]) -> bool:
    """Tell whether a collective can be run so, of what it was asked for; MPI must be CUDA-aware besides."""
    algorithm = options.get("algorithm", "auto")
    if algorithm == "auto" and make_plan is operations.plan_allreduce:
        algorithm = context.settings.algorithm
    reduces = make_plan in _REDUCING
    is_adasum = reduces and str(options.get("op", "")).rpartition(".")[2].lower() == "adasum"
    # A rank that is alone has nobody to send to, whatever MPI can do; but MPI would look at the memory all the same.
    shows_mpi = algorithm == NATIVE and (reduces or context.size == 1)
    return algorithm not in (DIRECT, HIERARCHICAL) and not shows_mpi and not is_adasum


def plan_straight(
    context: Context,
    make_plan: Callable[..., Plan[Any]],
    arguments: Sequence[Any],
    options: dict[str, Any],
    caller: CallersStream,
) -> Plan[Any]:
    """Prepare a collective of which all arrays of this rank lie on its device; arguments as for `plan_staged`.

    Raises:
        ValueError, TypeError: Bad argument.
        UnavailableError: What CuPy needs is missing.
        MemoryError: The device has no room for the result.
    """
    device = _DeviceContext(context, caller, reduces=make_plan in _REDUCING)
    plan = make_plan(cast("Context", device), *arguments, **options)

    def task(call: Call) -> Task[Any]:
        device.streams.compute.wait_event(caller.ready)
        result = yield from plan.task(call)
        yield from _until(device.streams.record(device.streams.compute))
        return result

    return dataclasses.replace(plan, description=f"{plan.description}, {STRAIGHT}", task=task, is_gated=False)


class _DeviceContext:
    """A context for arrays on this rank's device; everything else of it is that of the host.

    Args:
        context: Of the host.
        caller: The stream of who calls.
        reduces: Whether the collective does.
    """

    def __init__(self, context: Context, caller: CallersStream, *, reduces: bool) -> None:
        self._context = context
        self._caller = caller
        self.streams = streams_of(caller.device)
        self.scratch = cast("ScratchPool", _DeviceScratch(self.streams))
        choice = context.choice.without_shared_memory(has_native=not reduces and context.size > 1)
        self.choose = choice.choose
        self.available = choice.available
        self.meeting = None
        self.node = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    def execute(
        self,
        program: Program,
        arrays: Sequence[NDArray[Any]],
        dtype: DType,
        call: Call,
        op: ReduceOp = ReduceOp.SUM,
        *,
        finish: Finish | None = None,
    ) -> Task[None]:
        """Return the task that runs a program on device memory; on the host's, as ever."""
        if not is_on_device(arrays[0]):
            yield from self._context.execute(program, arrays, dtype, call, op, finish=finish)
            return
        yield from _until(self.streams.record(self.streams.compute))
        if program.transfers:
            run = _DeviceRun(self.streams, self._context.transport, program, arrays, dtype, tag=call.tag, op=op)
            yield from run.task(self.scratch, self._context.settings.receive_window)
        if finish is not None:
            finish(arrays[0])

    def run_native(
        self, call: Call, start: Callable[..., list[Request]], *arguments: object, keep_turn: bool = False
    ) -> Task[None]:
        """Run a collective of the MPI library when what is queued before it is done; see `Context.run_native`."""
        yield from _until(self.streams.record(self.streams.compute))
        yield from self._context.run_native(call, start, *arguments, keep_turn=keep_turn)

    def finisher(self, dtype: DType, op: ReduceOp) -> Finish:
        """Return what divides a sum by the number of ranks, if that is asked for."""

        def finish(data: NDArray[Any]) -> None:
            if op is ReduceOp.AVERAGE and self._context.size > 1:
                self._reduce([data], data, dtype, op, self._context.size)

        return finish

    def copy(self, target: NDArray[Any], source: NDArray[Any]) -> None:
        """Queue a copy between device arrays."""
        with _on(self.streams):
            target[...] = source

    def new_like(self, array: object, shape: int | Sequence[int], call: Call) -> Any:
        """Allocate on the stream of the caller, who will free it there; what it may still be used for comes first."""
        if not is_on_device(array):
            return self._context.new_like(array, shape, call)
        with self._caller.current():
            made = allocate_like(array, shape)
        self.streams.compute.wait_event(self._caller.record())
        return made

    def _reduce(self, parts: list[Any], total: Any, dtype: DType, op: ReduceOp, divisor: int) -> None:
        with _on(self.streams):
            reduce_peers(parts, [total], count=total.size, dtype=dtype, op=op, divisor=divisor)


class _DeviceScratch:
    """Scratch memory of the device, from CuPy's own pool, in the order of the compute stream."""

    def __init__(self, streams: Streams) -> None:
        self._streams = streams

    def acquire(self, nbytes: int) -> Any:
        """Return so many bytes."""
        with _on(self._streams):
            return empty((nbytes,), _BYTES.storage, self._streams.device)

    def release(self, array: Any) -> None:
        """Nothing to do: the array is given back when nobody refers to it."""


class _DeviceRun(Run):
    """An execution on device memory: what is reduced is done when its event is."""

    def __init__(self, streams: Streams, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._streams = streams
        self._reducing: deque[tuple[Event, int]] = deque()

    def _reduce(self, index: int) -> None:
        transfer = self.transfers[index]
        local = self.arrays[transfer.array][transfer.offset : transfer.offset + transfer.count]
        parts = [local, self.landing[index][: transfer.count]]
        with _on(self._streams):
            reduce_peers(parts, [local], count=transfer.count, dtype=self.dtype, op=self.op, divisor=1)
        self._reducing.append((self._streams.record(self._streams.compute), index))

    def _complete(self) -> bool:
        moved = super()._complete()
        while self._reducing and is_done(self._reducing[0][0]):
            self._reduced(self._reducing.popleft()[1])
            moved = True
        return moved


@contextlib.contextmanager
def _on(streams: Streams) -> Iterator[None]:
    """Queue what CuPy is asked for on the compute stream; there may be no `yield` of a task within."""
    with load_cupy("device arrays").cuda.Device(streams.device), streams.compute:
        yield


def _until(event: Event) -> Task[None]:
    while not is_done(event):
        yield False
