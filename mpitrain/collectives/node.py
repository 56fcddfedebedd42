"""The ranks of one node as seen from a communicator: shared blocks, and flags that say how far each rank is."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpitrain.collectives.executor import Task
from mpitrain.collectives.meeting import Meeting, meeting_nbytes
from mpitrain.comm import Topology, Transport
from mpitrain.config import Settings
from mpitrain.errors import CommError, UnavailableError
from mpitrain.memory import CrossMemory, SharedBlock, can_read, free_shared_nbytes, make_sample

__all__ = ["SHOWN", "FlagUsers", "Flags", "Node", "block_nbytes", "make_node"]

_log = logging.getLogger("mpitrain")

# A flag has a cache line of its own, so that setting one does not disturb the readers of another.
_FLAG_NBYTES = 64
_FLAG_STRIDE = _FLAG_NBYTES // 8
# Operations that are in flight at once; more wait for their turn.
_NUM_SLOTS = 128
_NUM_PHASES = 4
# In the last of them ranks show where their arrays lie; the addresses are beside the flag.
SHOWN = 3
_FLAGS_NBYTES = _NUM_SLOTS * _NUM_PHASES * _FLAG_NBYTES
# Of the staging memory; blocking calls have slots of their own, of this size, for what is not staged in pieces.
_SLOT_SHARE = 2
# For each rank, so that pieces of any dtype have a place for every owner.
_LEAST_STAGED_NBYTES = 256
_SLOT_GRAIN_NBYTES = 64
# What is read of peers at once: with as much of its own a rank stays in its core's cache. It is shared by the peers,
# but below the least there is more to ask for than to copy.
_BLOCK_NBYTES = 512 << 10
_LEAST_BLOCK_NBYTES = 64 << 10
_MOST_IDLE_BLOCKS = 4
# Parts of an operation that flags can tell apart.
_MOST_PARTS = 1 << 32
_MIB = 1 << 20


def block_nbytes(size: int) -> int:
    """Return how much of each peer's memory one of so many ranks reads at once; a multiple of every item size."""
    return max(_LEAST_BLOCK_NBYTES, _BLOCK_NBYTES // max(1, size - 1) // _SLOT_GRAIN_NBYTES * _SLOT_GRAIN_NBYTES)


class Flags:
    """Counters in shared memory: each rank says how far it is, and waits until all are as far.

    An operation has a number and uses the slot of that number modulo the number of slots; the numbers that are written
    to a slot only grow. So a rank that is late sees what it waits for even if another has reached the slot's next
    operation.

    Args:
        block: Its first bytes are the flags, zero at first.
        rank: This rank on the node.
    """

    def __init__(self, block: SharedBlock, rank: int) -> None:
        self._fence = block.fence
        self._flags = [view[:_FLAGS_NBYTES].data.cast("q") for view in block.views]
        self._own = self._flags[rank]
        self._others = [flags for index, flags in enumerate(self._flags) if index != rank]

    def signal(self, phase: int, number: int, part: int = 0) -> None:
        """Say that this rank has ended a phase of an operation, up to `part` of it.

        Whoever sees that also sees what this rank has written before.
        """
        self._fence()
        self._own[self._index(phase, number)] = number * _MOST_PARTS + part + 1

    def reached(self, phase: int, number: int, part: int = 0) -> bool:
        """Whether all ranks have said so."""
        index = self._index(phase, number)
        target = number * _MOST_PARTS + part + 1
        for flags in self._others:
            if flags[index] < target:
                return False
        self._fence()
        return True

    def show(self, number: int, source: int, target: int) -> None:
        """Tell the others of an operation at which addresses this rank reads and writes; 0 if they cannot read it."""
        index = self._index(SHOWN, number)
        self._own[index + 1], self._own[index + 2] = source, target
        self.signal(SHOWN, number)

    def shown(self, number: int) -> list[tuple[int, int]] | None:
        """Return what all ranks have shown of an operation, by rank; None as long as some have not."""
        if not self.reached(SHOWN, number):
            return None
        index = self._index(SHOWN, number)
        return [(flags[index + 1], flags[index + 2]) for flags in self._flags]

    def take_back(self, number: int) -> None:
        """Tell the others that what this rank has shown may change before they have read it."""
        self._own[self._index(SHOWN, number) + 3] = number
        self._fence()

    def was_taken_back(self, number: int) -> bool:
        """Whether any rank has said so of an operation that all have come to the end of."""
        index = self._index(SHOWN, number) + 3
        return any(flags[index] == number for flags in self._flags)

    @staticmethod
    def _index(phase: int, number: int) -> int:
        return (phase * _NUM_SLOTS + number % _NUM_SLOTS) * _FLAG_STRIDE


class FlagUsers:
    """The calls in flight on this rank that use flags, by number: so that a slot has one user at a time.

    It is enough to look at this rank: whoever has ended a call sees the larger number of a later one as its own.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._numbers: set[int] = set()

    def enter(self, number: int) -> None:
        """Note a call; its flags may be used when it is its `turn`."""
        with self._lock:
            self._numbers.add(number)

    def leave(self, number: int) -> None:
        """The call has ended, or never begins."""
        with self._lock:
            self._numbers.discard(number)

    def has_turn(self, number: int, num_slots: int = _NUM_SLOTS) -> bool:
        """Whether the call that had the slot before has ended; for slots of another kind, if there are fewer."""
        with self._lock:
            return min(self._numbers) > number - num_slots

    def turn(self, number: int, num_slots: int = _NUM_SLOTS) -> Task[None]:
        """Wait until it is so."""
        while not self.has_turn(number, num_slots):
            yield False


class Node:
    """What the ranks of one node share.

    Args:
        transport: The ranks of the node and no others; the node owns it from now on.
        staging_nbytes: Memory per rank through which ordinary arrays are passed, 0 for none.
        reads_memory: Whether ranks may read each other's memory where the kernel allows it; the same on all.

    Attributes:
        cross_memory: Reads it; None where some rank cannot read that of another.
    """

    def __init__(self, transport: Transport, staging_nbytes: int, *, reads_memory: bool = True) -> None:
        self._transport = transport
        self.rank = transport.rank
        self.size = transport.size
        staging_nbytes = max(staging_nbytes, _LEAST_STAGED_NBYTES * transport.size)
        slot_nbytes = staging_nbytes // _SLOT_SHARE // _SLOT_GRAIN_NBYTES * _SLOT_GRAIN_NBYTES
        self._staging_offset = _FLAGS_NBYTES + meeting_nbytes(slot_nbytes)
        self._block = _allocate(transport, self._staging_offset + staging_nbytes)
        self.flags = Flags(self._block, self.rank)
        self.flag_users = FlagUsers()
        self.meeting = Meeting(self._block, self.rank, _FLAGS_NBYTES, slot_nbytes)
        self.staging_nbytes = staging_nbytes
        # Operation and piece that used the staging memory last; at first, one that nobody waits for.
        self.last_staged = (0, -1)
        self.cross_memory = self._try_cross_memory() if reads_memory else None
        self._idle_blocks: list[NDArray[np.uint8]] = []

    def staging(self, storage: np.dtype[Any]) -> list[NDArray[Any]]:
        """Return every rank's staging memory as elements of one type."""
        return self._block.typed(storage, self._staging_offset, self.staging_nbytes // storage.itemsize)

    def allocate(self, nbytes: int) -> SharedBlock:
        """Allocate a block per rank. Every rank of the node must call.

        Raises:
            UnavailableError: There is not enough memory to share; on every rank of the node.
        """
        return _allocate(self._transport, nbytes)

    @contextmanager
    def blocks(self) -> Iterator[NDArray[np.uint8]]:
        """Lend memory for a block of each rank; any thread may call. Fresh pages would cost more than what is done."""
        try:
            memory = self._idle_blocks.pop()
        except IndexError:
            memory = np.empty(self.size * block_nbytes(self.size), np.uint8)
        yield memory
        if len(self._idle_blocks) < _MOST_IDLE_BLOCKS:
            self._idle_blocks.append(memory)

    def _try_cross_memory(self) -> CrossMemory | None:
        samples = self.gather(make_sample())
        if not all(self.gather(can_read(samples))):
            return None
        return CrossMemory([sample.pid for sample in samples])

    def gather(self, value: Any) -> list[Any]:
        """Collect a value of each rank of the node on every one of them, by rank; every one must call."""
        return self._transport.gather_everywhere(value)

    def free(self) -> None:
        """Give back the memory. Every rank of the node must call."""
        self._transport.free()


def make_node(transport: Transport, topology: Topology, settings: Settings) -> Node | None:
    """Make the node of this rank.

    Args:
        transport: All ranks; every one must call.
        topology: Of these.
        settings: Whether memory is shared at all, and how much is for staging.

    Returns:
        None, on all ranks, where no two ranks share a node, or where one of the nodes cannot share memory (a warning
        says so).
    """
    if not settings.shared_memory or all(len(ranks) == 1 for ranks in topology.nodes):
        return None
    on_node = transport.split(topology.node_index, transport.rank)
    assert on_node is not None
    try:
        node, problem = Node(on_node, settings.staging_nbytes, reads_memory=settings.cross_memory), ""
    except UnavailableError as error:
        node, problem = None, str(error)
    problems = [text for text in transport.gather_everywhere(problem) if text]
    if not problems:
        return node
    if transport.rank == 0:
        _log.warning("%s; ranks exchange messages instead, which is slower", problems[0])
    if node is not None:
        node.free()
    else:
        on_node.free()
    return None


def _allocate(transport: Transport, nbytes: int) -> SharedBlock:
    """Allocate, or raise the same error on all ranks of the node."""
    wanted_nbytes = sum(transport.gather_everywhere(nbytes))
    available_nbytes = transport.gather_everywhere(free_shared_nbytes())[0]
    if available_nbytes is not None and wanted_nbytes > available_nbytes:
        raise UnavailableError(
            f"shared memory: not enough on this node, asked for {wanted_nbytes / _MIB:.1f} MiB of which "
            f"{available_nbytes / _MIB:.1f} MiB are free; enlarge /dev/shm (containers: --shm-size)"
        )
    try:
        block, problem = transport.allocate_shared(nbytes), ""
    except CommError as error:
        block, problem = None, str(error)
    problems = [text for text in transport.gather_everywhere(problem) if text]
    if problems or block is None:
        raise UnavailableError(f"shared memory: the MPI library cannot share it ({problems[0]}); see its configuration")
    return block
