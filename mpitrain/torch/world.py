"""The default communicator behind the functions of the face, and process sets."""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from mpitrain.collectives import Communicator
from mpitrain.config import Settings, unused_horovod_variables
from mpitrain.errors import NotInitializedError
from mpitrain.negotiation import Negotiator
from mpitrain.observe import CommunicationCounters

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = [
    "ProcessSet",
    "add_process_set",
    "communication_counters",
    "communicator",
    "cross_rank",
    "cross_size",
    "global_process_set",
    "init",
    "init_again",
    "is_homogeneous",
    "is_initialized",
    "local_rank",
    "local_size",
    "negotiator_of",
    "rank",
    "remove_process_set",
    "shutdown",
    "size",
]

_log = logging.getLogger("mpitrain")


class ProcessSet:
    """Some of the ranks, which run collectives of their own without the others.

    Args:
        ranks: Global ranks, different from each other.

    Attributes:
        process_set_id: Number of the set, 0 for all ranks; None until it is added.
        ranks: Global ranks of the set, ascending; None for all ranks before `init`.
    """

    def __init__(self, ranks: Sequence[int] | None) -> None:
        self.process_set_id: int | None = None
        self.ranks = None if ranks is None else sorted(int(rank) for rank in ranks)
        self.negotiator: Negotiator | None = None

    def size(self) -> int | None:
        """Number of ranks in the set; None until it is added."""
        return None if self.process_set_id is None or self.ranks is None else len(self.ranks)

    def rank(self) -> int | None:
        """Rank of this process within the set; None if it is not included or the set not added."""
        return self.negotiator.comm.rank if self.negotiator is not None else None

    def included(self) -> bool:
        """Whether this process belongs to the set, which has been added."""
        return self.negotiator is not None

    def __deepcopy__(self, memo: object) -> ProcessSet:
        # What a copied model refers to are the same ranks.
        return self

    def __reduce__(self) -> str | tuple[type[ProcessSet], tuple[list[int] | None]]:
        # Of what is loaded elsewhere, only all ranks are a set without being added.
        return "global_process_set" if self is global_process_set else (ProcessSet, (self.ranks,))

    def __repr__(self) -> str:
        return f"ProcessSet(process_set_id={self.process_set_id}, ranks={self.ranks})"


global_process_set = ProcessSet(None)
"""All ranks."""


class _World:
    """What exists between `init` and `shutdown`."""

    def __init__(self, comm: Communicator) -> None:
        self.comm = comm
        self.process_sets: dict[int, ProcessSet] = {}
        self.ids = itertools.count()
        self.register(global_process_set, list(range(comm.size)), comm)

    def register(self, process_set: ProcessSet, ranks: list[int], comm: Communicator | None) -> None:
        process_set.process_set_id = next(self.ids)
        process_set.ranks = ranks
        process_set.negotiator = None if comm is None else Negotiator(comm)
        self.process_sets[process_set.process_set_id] = process_set

    def forget(self, process_set: ProcessSet) -> None:
        assert process_set.process_set_id is not None
        del self.process_sets[process_set.process_set_id]
        process_set.process_set_id = None
        process_set.negotiator = None


_world: _World | None = None
_last_init: Callable[[], None] | None = None


def init(comm: MPI.Comm | Sequence[int] | None = None, *, settings: Settings | None = None) -> None:
    """Start: make the communicator that all functions of this module use. A second call does nothing.

    Every rank must call. Initialises MPI if nobody has, and starts no thread.

    Args:
        comm: mpi4py communicator, or global ranks of which each must call; all ranks if not given.
        settings: Same on every rank; read from the environment if not given.

    Raises:
        ValueError: Unusable ranks, or an environment variable of the settings with an unusable value.
        UnavailableError: MPI lacks the thread level that the progress thread needs.
    """
    global _world, _last_init  # noqa: PLW0603  (the one default communicator of the process)
    if _world is None:
        _last_init = functools.partial(init, comm, settings=settings)
        _world = _World(Communicator.from_mpi(comm, settings=settings))
        if _world.comm.rank == 0:
            _name_unused_variables()


@functools.cache
def _name_unused_variables() -> None:
    """Say once which variables of Horovod are set in vain."""
    if names := unused_horovod_variables():
        _log.warning("r0 | not used here: %s; docs/horovod.md says why", ", ".join(names))


def init_again() -> None:
    """Call `init` as it was called the last time. Every rank must call, after `shutdown`.

    Raises:
        NotInitializedError: `init` has never been called.
    """
    if _last_init is None:
        raise _not_initialized()
    _last_init()


def shutdown() -> None:
    """End: other ranks get an error for operations that still need this one. Without `init` it does nothing.

    Returns at once; `init` may be called again, by all ranks.
    """
    global _world  # noqa: PLW0603  (the one default communicator of the process)
    if _world is None:
        return
    for process_set in list(_world.process_sets.values()):
        if process_set.negotiator is not None:
            # Takes along the negotiator, and the optimizers of the set.
            process_set.negotiator.group.leave("has shut down")
        _world.forget(process_set)
    global_process_set.ranks = None
    _world.comm.engine.close()
    _world = None


def is_initialized() -> bool:
    """Whether `init` has been called, and `shutdown` not since."""
    return _world is not None


def communicator() -> Communicator:
    """Return the communicator that all functions of the face use, for what only it can do.

    Raises:
        NotInitializedError: Before `init`.
    """
    return _initialized().comm


def negotiator_of(process_set: ProcessSet, operation: str) -> Negotiator:
    """Return what runs the named operations of a process set.

    Raises:
        NotInitializedError: Before `init`.
        ValueError: The set was not added, or does not include this rank.
    """
    current = _initialized()
    if process_set.process_set_id is None or process_set.process_set_id not in current.process_sets:
        raise ValueError(
            f"{operation}: Process set provided does not exist, or has not been registered, got {process_set}; "
            "call add_process_set on all ranks first"
        )
    if process_set.negotiator is None:
        raise ValueError(
            f"{operation}: Rank {current.comm.rank} is not a member of the provided process set, got {process_set}; "
            "call on its members only"
        )
    return process_set.negotiator


def add_process_set(process_set: ProcessSet | Sequence[int]) -> ProcessSet:
    """Make a process set usable. Every rank must call, the ranks outside the set too.

    Raises:
        NotInitializedError: Before `init`.
        ValueError: Ranks out of range or repeated, a set of these ranks exists, or ranks passed different sets;
            on every rank.
    """
    current = _initialized()
    made = process_set if isinstance(process_set, ProcessSet) else ProcessSet(process_set)
    proposals = current.comm.allgather_obj(made.ranks)
    ranks = proposals[0]
    if any(proposal != ranks for proposal in proposals):
        raise ValueError(f"process set: must be the same on every rank, got {proposals} by rank; pass equal ranks")
    if not ranks or len(set(ranks)) != len(ranks) or ranks[0] < 0 or ranks[-1] >= current.comm.size:
        raise ValueError(
            f"process set: must have different ranks of 0 to {current.comm.size - 1}, got {ranks}; correct the ranks"
        )
    for existing in current.process_sets.values():
        if existing.ranks == ranks:
            raise ValueError(f"process set: exists already, got {ranks}; use {existing}")
    current.register(made, ranks, current.comm.split(0 if current.comm.rank in ranks else None))
    return made


def remove_process_set(process_set: ProcessSet) -> bool:
    """Forget a process set. Every rank must call, when no operation of the set is in flight.

    Returns:
        Whether there was one; False for the global set.
    """
    current = _initialized()
    if process_set is global_process_set or process_set.process_set_id not in current.process_sets:
        return False
    if process_set.negotiator is not None:
        process_set.negotiator.free()
        process_set.negotiator.group.free()
    current.forget(process_set)
    return True


def size() -> int:
    """Number of ranks."""
    return communicator().size


def rank() -> int:
    """This rank, from 0 to `size() - 1`."""
    return communicator().rank


def local_size() -> int:
    """Number of ranks on this node."""
    return communicator().topology.local_size


def local_rank() -> int:
    """Position of this rank among those of its node."""
    return communicator().topology.local_rank


def cross_size() -> int:
    """Number of nodes that have a rank with this local rank."""
    return communicator().topology.cross_size


def cross_rank() -> int:
    """Position of this rank among those with its local rank, one per node."""
    return communicator().topology.cross_rank


def is_homogeneous() -> bool:
    """Whether all nodes have the same number of ranks."""
    return communicator().topology.is_homogeneous


def communication_counters() -> CommunicationCounters:
    """What this process has communicated since `init`, and for how many seconds that was exposed or hidden.

    The difference of two is what was communicated in between:

        before = hvd.communication_counters()
        train_one_epoch()
        spent = hvd.communication_counters() - before

    Raises:
        NotInitializedError: Before `init`.
    """
    return communicator().engine.counters


def _initialized() -> _World:
    if _world is None:
        raise _not_initialized()
    return _world


def _not_initialized() -> NotInitializedError:
    return NotInitializedError("mpitrain has not been initialized; call mpitrain.torch.init() first")
