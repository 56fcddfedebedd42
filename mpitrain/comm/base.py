"""What the layers above need of a message-passing system: the `Transport` interface.

Two implementations: `comm.mpi` (processes of an MPI job) and `comm.thread` (ranks that are
threads of one process, for tests). A transport knows messages and who is where, and no algorithm.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from mpitrain.memory import SharedBlock

__all__ = ["Bytes", "Request", "Transport"]

Bytes = npt.NDArray[np.uint8]
"""A contiguous one-dimensional buffer, seen as bytes."""

Request = Any
"""A message under way; opaque, made and tested by the transport that it belongs to."""


class Transport(abc.ABC):
    """Messages among `size` ranks; this process or thread is `rank`.

    Two kinds of messages never meet: buffers, which match by source and tag in the order of posting, and notices,
    small byte strings that need no receive to be posted.

    Attributes:
        rank: This rank, 0 to size - 1.
        size: Number of ranks.
        max_tag: The largest usable tag.
        native: The MPI library's own collectives (`comm.mpi_native`), None where there are none.
    """

    rank: int
    size: int
    max_tag: int
    native: Any = None

    @abc.abstractmethod
    def isend(self, buffer: Bytes, dest: int, tag: int) -> Request:
        """Start sending; `buffer` must stay unchanged until the request is done."""

    @abc.abstractmethod
    def irecv(self, buffer: Bytes, source: int, tag: int) -> Request:
        """Start receiving exactly `buffer.nbytes` bytes."""

    @abc.abstractmethod
    def test_some(self, requests: list[Request]) -> Sequence[int]:
        """Indices of the requests that are done; these must not be tested again.

        Raises:
            CollectiveMismatchError: A message had another length than its receive.
            CommError: The messages cannot be exchanged.
        """

    @abc.abstractmethod
    def abandon(self, requests: list[Request]) -> None:
        """Give up requests of a failed operation: cancel receives, keep buffers of sends alive."""

    @abc.abstractmethod
    def notify(self, dest: int, notice: bytes) -> None:
        """Send a notice; returns at once. Notices from one source arrive in order."""

    @abc.abstractmethod
    def notices(self) -> list[tuple[int, bytes]]:
        """Take the notices that have arrived, as (source, notice)."""

    @abc.abstractmethod
    def gather_everywhere(self, value: Any) -> list[Any]:
        """Collect one picklable value per rank on every rank. Blocks; for set-up, not for data."""

    @abc.abstractmethod
    def node_leader(self) -> int:
        """Return the lowest rank among those that share this rank's node. Every rank must call."""

    @abc.abstractmethod
    def allocate_shared(self, nbytes: int) -> SharedBlock:
        """Allocate a block of memory per rank that all ranks map; all must be on one node, and call.

        Raises:
            CommError: Memory cannot be shared.
        """

    @abc.abstractmethod
    def split(self, color: int | None, key: int) -> Transport | None:
        """Make transports of the ranks of one color, ordered by key; None where color is None.

        Every rank must call.
        """

    def ranks_of(self, comm: Any) -> list[int] | None:
        """Return the ranks here of the members of an MPI communicator; -1 for one that has none.

        None for a null communicator.

        Raises:
            TypeError: These ranks know nothing of MPI.
        """
        raise TypeError(f"comm: must be of the same kind as these ranks, got {comm!r}; pass ranks")

    @abc.abstractmethod
    def free(self) -> None:
        """Release what the transport holds. Every rank must call, with no operation in flight."""

    @abc.abstractmethod
    def abort(self) -> None:
        """End the whole job at once, with a failure."""

    def duplicate(self) -> Transport:
        """Make a transport of the same ranks whose messages never meet those of this one."""
        transport = self.split(0, self.rank)
        assert transport is not None
        return transport
