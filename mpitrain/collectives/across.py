"""Reduces slices over the nodes: the network part of the hierarchical algorithm."""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

from mpitrain.collectives.executor import Task, execute
from mpitrain.collectives.layout import Layout, even_counts
from mpitrain.collectives.program import compile_program
from mpitrain.collectives.reduction import Reduction
from mpitrain.comm import Topology, Transport
from mpitrain.config import Settings
from mpitrain.memory import ScratchPool
from mpitrain.observe import OperationTrace
from mpitrain.schedules import find_algorithm

__all__ = ["AcrossNodes"]

# Every tag below the smallest bound that the MPI standard allows.
_NUM_TAGS = 32768


class AcrossNodes:
    """Runs a schedule among the ranks that own the same slice, one of each node.

    Args:
        transport: These ranks; None for a rank that owns no slice.
        num_slices: See `direct.Across`.
        settings: Same on every rank.
        scratch: See `execute`.
        algorithm: An all-reduce of the registry of schedules.
    """

    def __init__(
        self,
        transport: Transport | None,
        num_slices: int,
        settings: Settings,
        scratch: ScratchPool,
        algorithm: str = "ring",
    ) -> None:
        self.num_slices = num_slices
        self._transport = transport
        self._settings = settings
        self._scratch = scratch
        self._algorithm = find_algorithm("allreduce", algorithm)

    @classmethod
    def make(cls, transport: Transport, topology: Topology, settings: Settings, scratch: ScratchPool) -> AcrossNodes:
        """Make the crossing of a communicator's nodes; every rank must call."""
        num_slices = min(len(ranks) for ranks in topology.nodes)
        owns_slice = topology.local_rank < num_slices
        part = transport.split(topology.local_rank if owns_slice else None, topology.node_index)
        return cls(part, num_slices, settings, scratch)

    def allreduce(
        self, data: NDArray[Any], reduction: Reduction, tag: int, trace: OperationTrace | None = None
    ) -> Task[None]:
        """Return the task that reduces `data` in place; see `direct.Across`, and `execute` for `trace`."""
        transport = self._transport
        assert transport is not None
        num_chunks = self._algorithm.num_chunks(transport.size, 1)
        program = compile_program(
            self._algorithm,
            transport.rank,
            transport.size,
            Layout.packed(even_counts(data.size, num_chunks)),
            max(1, self._settings.segment_nbytes // data.itemsize),
        )
        return execute(
            transport,
            program,
            [data],
            reduction.dtype,
            tag=tag % _NUM_TAGS,
            op=reduction.op,
            scratch=self._scratch,
            receive_window=self._settings.receive_window,
            trace=trace,
        )

    def free(self) -> None:
        """Release the transport. Every rank must call."""
        if self._transport is not None:
            self._transport.free()
