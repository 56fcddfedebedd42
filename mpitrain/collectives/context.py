"""What all operations of one communicator share."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

from numpy.typing import NDArray

from mpitrain.collectives.executor import Task, execute
from mpitrain.collectives.layout import Layout
from mpitrain.collectives.plan import Call
from mpitrain.collectives.program import Program, compile_program
from mpitrain.collectives.selection import choose_num_segments
from mpitrain.comm import Request, Transport
from mpitrain.config import Settings
from mpitrain.memory import DType, ReduceOp, ScratchPool
from mpitrain.schedules import find_algorithm

__all__ = ["Context", "NativeOrder"]


class NativeOrder:
    """Lets the MPI library's collectives start in the order in which they were called.

    MPI matches them by that order, but an operation that the progress thread advances may get to its start late.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._issued = 0
        self._current = 0
        self._left: set[int] = set()

    def take_ticket(self) -> int:
        """Return the next ticket; every rank takes them in the same order."""
        with self._lock:
            self._issued += 1
            return self._issued - 1

    def may_start(self, ticket: int) -> bool:
        """Whether all earlier tickets have been given back."""
        return ticket <= self._current

    def give_back(self, ticket: int) -> None:
        """The collective has started, or never will; later calls change nothing."""
        with self._lock:
            if ticket < self._current:
                return
            self._left.add(ticket)
            while self._current in self._left:
                self._left.remove(self._current)
                self._current += 1


class Context:
    """Transport, settings and scratch memory of one communicator, and how its operations run."""

    def __init__(self, transport: Transport, settings: Settings, scratch: ScratchPool) -> None:
        self.transport = transport
        self.settings = settings
        self.scratch = scratch
        self.native_order = NativeOrder()
        self.rank = transport.rank
        self.size = transport.size

    @property
    def has_native(self) -> bool:
        """Whether "native" may be asked for."""
        return self.transport.native is not None

    def num_chunks(self, collective: str, algorithm: str, nbytes: int) -> int:
        """Return into how many chunks the algorithm cuts a buffer of so many bytes."""
        num_segments = choose_num_segments(nbytes, self.settings.segment_nbytes)
        return find_algorithm(collective, algorithm).num_chunks(self.size, num_segments)

    def program(
        self, collective: str, algorithm: str, layout: Layout, dtype: DType, *, nbytes: int, root: int = 0
    ) -> Program:
        """Return this rank's program; made once for each combination of arguments."""
        return compile_program(
            find_algorithm(collective, algorithm),
            self.rank,
            self.size,
            root,
            choose_num_segments(nbytes, self.settings.segment_nbytes),
            layout,
            max(1, self.settings.segment_nbytes // dtype.itemsize),
        )

    def execute(
        self,
        program: Program,
        arrays: Sequence[NDArray[Any]],
        dtype: DType,
        call: Call,
        op: ReduceOp = ReduceOp.SUM,
    ) -> Task[None]:
        """Return the task that runs a program on this communicator."""
        return execute(
            self.transport,
            program,
            arrays,
            dtype,
            tag=call.tag,
            op=op,
            scratch=self.scratch,
            receive_window=self.settings.receive_window,
        )

    def run_native(self, call: Call, start: Callable[..., list[Request]], *arguments: object) -> Task[None]:
        """Run `start(*arguments, blocking=...)`, a collective of the MPI library, when its turn comes."""
        while not self.native_order.may_start(call.ticket):
            yield False
        requests = start(*arguments, blocking=call.blocking)
        self.native_order.give_back(call.ticket)
        try:
            while requests:
                done = self.transport.test_some(requests)
                for position in sorted(done, reverse=True):
                    del requests[position]
                if requests:
                    yield bool(done)
        except BaseException:
            self.transport.abandon(requests)
            raise

    def check_root(self, collective: str, root: int) -> None:
        """Refuse a root that is no rank.

        Raises:
            ValueError: On every rank that passes it.
        """
        if isinstance(root, bool) or not isinstance(root, int) or not 0 <= root < self.size:
            raise ValueError(f"{collective}: root out of range, got {root!r}; use a rank from 0 to {self.size - 1}")
