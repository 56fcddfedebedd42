"""How `auto` is resolved on one communicator: by the measured table where it has an answer, else by prediction."""

from __future__ import annotations

from mpitrain.collectives.predict import predict_algorithm
from mpitrain.collectives.selection import Available, check_algorithm, known_algorithms
from mpitrain.collectives.table import Shape, Table
from mpitrain.schedules import ALGORITHMS

__all__ = ["AlgorithmChoice"]


class AlgorithmChoice:
    """Chooses algorithms for a group; all ranks choose the same, as they have made it of the same.

    Args:
        available: What can be run besides the schedules.
        shape: Of the group.
        table: What was measured, None if nothing was.
        segment_nbytes: See `Settings`.
    """

    def __init__(self, available: Available, shape: Shape, table: Table | None, segment_nbytes: int) -> None:
        self.table = table
        self.available = available
        self._shape = shape
        self._segment_nbytes = segment_nbytes
        self._candidates = {
            collective: tuple(name for name in known_algorithms(collective, available) if name != "auto")
            for collective in ALGORITHMS
        }

    def without_shared_memory(self, *, has_native: bool) -> AlgorithmChoice:
        """Return a choice for the same ranks among schedules, and the MPI library's own collectives if it has them."""
        available = Available(has_native and self.available.has_native, None)
        return AlgorithmChoice(available, self._shape, None, self._segment_nbytes)

    def choose(
        self,
        collective: str,
        name: str,
        nbytes: int,
        *,
        blocking: bool = True,
        in_window: bool = False,
        on_device: bool = False,
    ) -> str:
        """Return the algorithm to run: `name` itself unless that is "auto".

        Args:
            collective: Such as "allreduce".
            name: What the caller asked for.
            nbytes: Bytes of the full buffer; same on every rank.
            blocking: Whether the caller waits in the call; same on every rank.
            in_window: Whether the array lies in memory that the node shares; same on every rank.
            on_device: Whether that is the memory of devices.

        Raises:
            ValueError: No such algorithm.
        """
        check_algorithm(collective, name, self.available)
        if name != "auto":
            return name
        candidates = self._candidates[collective]
        if on_device and in_window and self.available.shared in candidates:
            # Everything else copies the array to the host and back, at a small part of the rate of a device's memory.
            return str(self.available.shared)
        if self.table is not None:
            measured = self.table.lookup(collective, nbytes, self._shape, blocking=blocking, in_window=in_window)
            # The table may come from ranks that could share memory where these cannot.
            if measured in candidates:
                return str(measured)
        return predict_algorithm(
            collective,
            nbytes,
            self._shape,
            candidates,
            segment_nbytes=self._segment_nbytes,
            blocking=blocking,
            in_window=in_window,
            reads_memory=self.available.reads_memory,
        )
