"""What all operations of one communicator share."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpitrain.collectives.across import AcrossNodes
from mpitrain.collectives.call_order import CallOrder
from mpitrain.collectives.choice import AlgorithmChoice
from mpitrain.collectives.device_direct import DeviceRun, device_allreduce
from mpitrain.collectives.direct import Across, shared_allreduce, staged_allreduce
from mpitrain.collectives.executor import Task, execute
from mpitrain.collectives.gate import Finish
from mpitrain.collectives.layout import Layout
from mpitrain.collectives.meeting import meeting_nbytes
from mpitrain.collectives.node import FlagUsers, Node, make_node
from mpitrain.collectives.node_memory import NodeMemory
from mpitrain.collectives.observed import ObservedAcross, observed_node
from mpitrain.collectives.optional_meeting import OptionalMeeting
from mpitrain.collectives.plan import Call
from mpitrain.collectives.program import Program, compile_program
from mpitrain.collectives.reading import read_allreduce
from mpitrain.collectives.reclaim import Free, Reclaimer
from mpitrain.collectives.reduction import Reduction
from mpitrain.collectives.selection import DIRECT, HIERARCHICAL, Available, choose_num_segments
from mpitrain.collectives.table import Shape, Table
from mpitrain.comm import Request, Topology, Transport
from mpitrain.config import Settings
from mpitrain.errors import UnavailableError
from mpitrain.memory import (
    DType,
    NodeArray,
    ReduceOp,
    ScratchPool,
    SharedArray,
    SharedDeviceArray,
    allocate_like,
    check_op,
    parse_op,
)
from mpitrain.memory.device import is_done
from mpitrain.schedules import find_algorithm

__all__ = ["Context"]

_log = logging.getLogger("mpitrain")


class Context:
    """Transport, settings and scratch memory of one communicator, and how its operations run."""

    def __init__(
        self, transport: Transport, topology: Topology, settings: Settings, table: Table | None = None
    ) -> None:
        self.transport = transport
        self.settings = settings
        self.rank = transport.rank
        self.size = transport.size
        self.scratch = ScratchPool()
        self._is_freed = False
        # Of what hangs on the communicator.
        self.reclaimer = Reclaimer(transport)
        # MPI matches the library's own collectives by the order in which they start.
        self.native_order = CallOrder()
        # One operation at a time uses the node's staging memory.
        self.staging_order = CallOrder()
        self.node = make_node(transport, topology, settings)
        self.across = None
        if self.node is not None and len(topology.nodes) > 1:
            self.across = AcrossNodes.make(transport, topology, settings, self.scratch)
        # What gives back device memory of the communicator's own, which others map.
        self.close_owned: list[Free] = []
        self.memory = NodeMemory(transport, topology, settings, self.node, self.reclaimer)
        # Where all ranks are on one node.
        self.meeting = self.node.meeting if self.node is not None and self.across is None else None
        shared = None if self.node is None else DIRECT if self.across is None else HIERARCHICAL
        reads_memory = self.meeting is not None and self.node is not None and self.node.cross_memory is not None
        self.available = Available(self.has_native, shared, reads_memory)
        self.choice = AlgorithmChoice(self.available, Shape.of(topology), table, settings.segment_nbytes)
        self.choose = self.choice.choose

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
            layout,
            max(1, self.settings.segment_nbytes // dtype.itemsize),
            root=root,
            num_segments=choose_num_segments(nbytes, self.settings.segment_nbytes),
        )

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
        """Return the task that runs a program on this communicator; `finish` as in `executor.execute`."""
        return execute(
            self.transport,
            program,
            arrays,
            dtype,
            tag=call.tag,
            op=op,
            scratch=self.scratch,
            receive_window=self.settings.receive_window,
            trace=call.trace,
            gates=call.gates,
            finish=finish,
        )

    def finisher(self, dtype: DType, op: ReduceOp) -> Finish:
        """Return what turns the sum over all ranks into what was asked for, in place."""
        return Reduction(dtype, op, self.size).finish

    @staticmethod
    def copy(target: NDArray[Any], source: NDArray[Any]) -> None:
        """Copy elements between arrays of this rank, before or after messages."""
        target[...] = source

    @staticmethod
    def new_like(array: object, shape: int | Sequence[int], call: Call) -> Any:
        """Allocate a result of a call; see `memory.allocate_like`."""
        result = allocate_like(array, shape)
        if call.gates is not None:
            call.gates.add(result)
        return result

    def place_of(self, array: Any) -> str:
        """Return where a shared array lies, to be compared in descriptions; nothing for any other array."""
        return f" in {array.place}" if self.shares(array) else ""

    def shares(self, array: Any) -> bool:
        """Whether an array lies in memory that exactly the ranks of this communicator share, in their order."""
        return isinstance(array, NodeArray) and array.place is not None and array.place.sharers is self.memory.sharers

    def make_optional_meeting(self, slot_nbytes: int) -> OptionalMeeting | None:
        """Make a place for meetings of their own; every rank must call. None where the ranks do not meet."""
        if self.node is None or self.meeting is None:
            return None
        try:
            block = self.node.allocate(meeting_nbytes(slot_nbytes))
        except UnavailableError as error:
            if self.rank == 0:
                _log.warning("%s; small named operations ask rank 0 instead, which is slower", error)
            return None
        return OptionalMeeting(block, self.node.rank, 0, slot_nbytes)

    @property
    def flag_users(self) -> FlagUsers:
        """The calls in flight that use the flags of the node."""
        assert self.node is not None
        return self.node.flag_users

    def run_shared(self, array: SharedArray, reduction: Reduction, call: Call) -> Task[None]:
        """Return the task that reduces an array which lies in the node's memory."""
        node, across = self._place_of(call)
        return shared_allreduce(node, array.everybodys, reduction, call.number + 1, across)

    def run_on_device(self, array: SharedDeviceArray, reduction: Reduction, call: Call, run: DeviceRun) -> Task[None]:
        """Reduce an array that lies in device memory of the node."""
        node, across = self._place_of(call)
        end = yield from device_allreduce(node, array, reduction, call.number, begin=run.begin, across=across)
        run.end(end)
        # The caller of a blocking call gets an error if it takes too long, and a result that is there.
        while call.blocking and not is_done(end):
            yield False

    def run_ordinary(self, source: NDArray[Any], target: NDArray[Any], reduction: Reduction, call: Call) -> Task[None]:
        """Reduce ordinary arrays in the node into others, which may be the same."""
        node, across = self._place_of(call)
        gate = None if call.gates is None else call.gates.of(target)
        number = call.number + 1
        has_read = yield from read_allreduce(node, source, target, reduction, number, across=across, gate=gate)
        if has_read:
            return
        if source is not target:
            target[:] = source
        while not self.staging_order.may_start(call.staging_ticket):
            yield False
        yield from staged_allreduce(node, target, reduction, number, across, gate=gate)

    def _place_of(self, call: Call) -> tuple[Node, Across | None]:
        """Return where a call reduces in shared memory, watched if somebody wants to know."""
        assert self.node is not None
        if call.trace is None:
            return self.node, self.across
        across = None if self.across is None else ObservedAcross(self.across, call.trace)
        return observed_node(self.node, call.trace), across

    def run_native(
        self, call: Call, start: Callable[..., list[Request]], *arguments: object, keep_turn: bool = False
    ) -> Task[None]:
        """Run `start(*arguments, blocking=...)`, a collective of the MPI library, when its turn comes.

        With `keep_turn` another one of the same call follows.
        """
        task = self._run_native(call, start, *arguments, keep_turn=keep_turn)
        return task if call.trace is None else call.trace.hold("MPI", task)

    def _run_native(
        self, call: Call, start: Callable[..., list[Request]], *arguments: object, keep_turn: bool
    ) -> Task[None]:
        while not self.native_order.may_start(call.ticket):
            yield False
        # A time limit is for who can stop waiting.
        requests = start(*arguments, blocking=call.blocking and not self.settings.timeout_s)
        if not keep_turn:
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

    @staticmethod
    def check_reduction(collective: str, op: str | ReduceOp, dtype: DType) -> ReduceOp:
        """Return the operation that `op` names.

        Raises:
            ValueError: No such operation, or one that does not work element by element.
            TypeError: It has no meaning for the dtype.
        """
        op = parse_op(op)
        if op is ReduceOp.ADASUM:
            raise ValueError(f"{collective}: op must work element by element, got adasum; use allreduce, which has it")
        check_op(op, dtype)
        return op

    def check_root(self, collective: str, root: object) -> None:
        """Refuse a root that is no rank.

        Raises:
            ValueError: On every rank that passes it.
        """
        if isinstance(root, bool) or not isinstance(root, int | np.integer) or not 0 <= root < self.size:
            raise ValueError(f"{collective}: root out of range, got {root!r}; use a rank from 0 to {self.size - 1}")

    def free(self) -> None:
        """Release memory and transports. Every rank must call, with no operation in flight; again it does nothing."""
        if self._is_freed:
            return
        self._is_freed = True
        self.reclaimer.reclaim()
        self.reclaimer.free_together(self.close_owned)
        if self.across is not None:
            self.across.free()
        if self.node is not None:
            self.node.free()
        self.transport.free()
