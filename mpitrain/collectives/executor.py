"""Runs a program: moves real buffers over a transport, as a task that never blocks.

A *task* is a generator. Each `next` moves on whatever can move and yields whether anything did; the return value is
the result. Whoever drives it (a blocking call, or the progress thread for all operations in flight) decides how to
wait.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Generator, Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from mpitrain.collectives.gate import Finish, Gates, Gating
from mpitrain.collectives.program import Program
from mpitrain.comm import Bytes, Request, Transport
from mpitrain.memory import DType, ReduceOp, ScratchPool, reduce_into
from mpitrain.observe import TRANSFER, OperationTrace

__all__ = ["Run", "Task", "execute"]

Result = TypeVar("Result")
Task = Generator[bool, None, Result]

_NOTHING: Bytes = np.empty(0, dtype=np.uint8)


def execute(
    transport: Transport,
    program: Program,
    arrays: Sequence[NDArray[Any]],
    dtype: DType,
    *,
    tag: int,
    op: ReduceOp = ReduceOp.SUM,
    scratch: ScratchPool,
    receive_window: int = 4,
    trace: OperationTrace | None = None,
    gates: Gates | None = None,
    finish: Finish | None = None,
) -> Task[None]:
    """Return the task that runs `program`.

    Args:
        transport: Where the messages go; every rank runs its own program of the same schedule.
        program: Compiled for this rank.
        arrays: The arrays that the program's layout numbers, one-dimensional and contiguous, in storage dtype.
        dtype: What the arrays hold; same on every rank.
        tag: No other operation in flight on this transport may have it; same on every rank.
        op: How received elements are reduced; same on every rank.
        scratch: Memory for segments that wait to be reduced is taken from here and given back.
        receive_window: How many such segments may be in flight; more where the program needs it.
        trace: Told what is done, if given.
        gates: Of those arrays that have not arrived yet, or leave before the end.
        finish: Done to every part of the first array, once no transfer touches it any more.
    """
    run = Run if trace is None else functools.partial(_ObservedRun, trace)
    the_run = run(transport, program, arrays, dtype, tag=tag, op=op)
    if gates is not None:
        for number, array in enumerate(arrays):
            if (gate := gates.of(array)) is not None:
                last_touch = None if number else finish
                the_run.gatings.append(Gating(gate, program, the_run.waits, number, last_touch))
    if program.transfers:
        yield from the_run.task(scratch, receive_window)
    for gating in the_run.gatings:
        yield from gating.end()
    if finish is not None and (gates is None or gates.of(arrays[0]) is None):
        finish(arrays[0])


class Run:
    """The state of one execution."""

    def __init__(
        self,
        transport: Transport,
        program: Program,
        arrays: Sequence[NDArray[Any]],
        dtype: DType,
        *,
        tag: int,
        op: ReduceOp,
    ) -> None:
        self.transport = transport
        self.transfers = program.transfers
        self.program = program
        self.arrays = arrays
        self.dtype = dtype
        self.tag = tag
        self.op = op
        self.waits = list(program.waits)
        self.sends = [deque(queue) for queue in program.sends]
        self.receives = deque(program.receives)
        self.remaining = len(program.transfers)
        # Parallel lists: requests under way, the transfer of each, and where a segment to be reduced lands.
        self.requests: list[Request] = []
        self.owners: list[int] = []
        self.slots: list[NDArray[Any]] = []
        self.landing: dict[int, NDArray[Any]] = {}
        # Received, but the old contents are still being sent to somebody.
        self.arrived: list[int] = []
        self.gatings: list[Gating] = []

    def task(self, scratch: ScratchPool, receive_window: int) -> Task[None]:
        """Move transfers until none remains."""
        program = self.program
        num_slots = min(max(receive_window, program.least_slots), program.num_reduces)
        memory: Bytes | None = None
        if num_slots:
            nbytes = program.largest_reduce_count * self.dtype.itemsize
            aligned_nbytes = -(-nbytes // 64) * 64
            memory = scratch.acquire(num_slots * aligned_nbytes)
            rows = memory.reshape(num_slots, aligned_nbytes)
            self.slots = [row[:nbytes].view(self.dtype.storage) for row in rows]
        try:
            while True:
                moved = self._post_receives()
                moved |= self._post_sends()
                moved |= self._complete()
                if not self.remaining:
                    return
                yield moved
        except BaseException:
            # MPI may still write into the slots: they are lost to the pool, not given back.
            memory = None
            self.transport.abandon(self.requests)
            raise
        finally:
            if memory is not None:
                scratch.release(memory)

    def _post_receives(self) -> bool:
        moved = False
        while self.receives:
            index = self.receives[0]
            transfer = self.transfers[index]
            if transfer.reduce:
                if not self.slots:
                    break
                target = self.slots.pop()
                self.landing[index] = target
                buffer = target[: transfer.count].view("u1")
            elif self.waits[index]:
                break
            else:
                buffer = self._bytes(index)
            self.receives.popleft()
            self._track(self.transport.irecv(buffer, transfer.peer, self.tag), index)
            moved = True
        return moved

    def _post_sends(self) -> bool:
        moved = False
        for queue in self.sends:
            while queue and not self.waits[queue[0]]:
                index = queue.popleft()
                self._track(self.transport.isend(self._bytes(index), self.transfers[index].peer, self.tag), index)
                moved = True
        return moved

    def _complete(self) -> bool:
        admitted = self._admit() if self.gatings else False
        done = self.transport.test_some(self.requests) if self.requests else ()
        if not done:
            return admitted
        for position in sorted(done, reverse=True):
            index = self.owners[position]
            # Order in these lists means nothing: fill the gap with the last entry.
            self.requests[position] = self.requests[-1]
            self.owners[position] = self.owners[-1]
            self.requests.pop()
            self.owners.pop()
            if not self.transfers[index].reduce:
                self._finish(index)
            elif self.waits[index]:
                self.arrived.append(index)
            else:
                self._reduce(index)
        return True

    def _reduce(self, index: int) -> None:
        transfer = self.transfers[index]
        local = self.arrays[transfer.array][transfer.offset : transfer.offset + transfer.count]
        reduce_into(local, self.landing[index][: transfer.count], self.op, self.dtype)
        self._reduced(index)

    def _reduced(self, index: int) -> None:
        """What a transfer has brought is reduced."""
        self.slots.append(self.landing.pop(index))
        self._finish(index)

    def _admit(self) -> bool:
        """Let go on what has waited for its memory to arrive."""
        admitted = [index for gating in self.gatings for index in gating.admit()]
        for index in admitted:
            self._release(index)
        return bool(admitted)

    def _finish(self, index: int) -> None:
        self.remaining -= 1
        for gating in self.gatings:
            gating.done(index)
        for later in self.transfers[index].releases:
            self._release(later)

    def _release(self, index: int) -> None:
        """A transfer waits for one thing less."""
        self.waits[index] -= 1
        if not self.waits[index] and index in self.arrived:
            self.arrived.remove(index)
            self._reduce(index)

    def _track(self, request: Request, index: int) -> None:
        self.requests.append(request)
        self.owners.append(index)

    def _bytes(self, index: int) -> Bytes:
        transfer = self.transfers[index]
        if transfer.array < 0:
            return _NOTHING
        return self.arrays[transfer.array][transfer.offset : transfer.offset + transfer.count].view("u1")


class _ObservedRun(Run):
    """One that says what it does."""

    def __init__(self, trace: OperationTrace, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.trace = trace

    def _complete(self) -> bool:
        moved = super()._complete()
        if moved:
            self.trace.note_message()
        return moved

    def _reduce(self, index: int) -> None:
        self.trace.enter("reduce")
        super()._reduce(index)
        self.trace.enter(TRANSFER)
