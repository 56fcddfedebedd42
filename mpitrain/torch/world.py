"""The default communicator behind the functions of the face, and process sets."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from mpitrain.collectives import Communicator
from mpitrain.config import Settings, unused_horovod_variables
from mpitrain.errors import NotInitializedError
from mpitrain.negotiation import Negotiator
from mpitrain.torch.process_sets import ProcessSet, World, agreed_removals, global_process_set

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = [
    "ProcessSet",
    "add_process_set",
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
    "negotiators",
    "rank",
    "remove_process_set",
    "shutdown",
    "size",
]

_log = logging.getLogger("mpitrain")


_world: World | None = None
_predecessor: World | None = None
_last_init: Callable[[], None] | None = None


def init(
    comm: MPI.Comm | Sequence[int] | None = None,
    process_sets: Sequence[ProcessSet | Iterable[int] | MPI.Comm] | str | None = None,
    *,
    settings: Settings | None = None,
) -> None:
    """Start: make the communicator that all functions of this module use. A second call does nothing.

    Every rank must call. Initialises MPI if nobody has. With several ranks, one thread sleeps from now on but for
    moments in which it listens to the others.

    Args:
        comm: mpi4py communicator, or global ranks of which each must call; all ranks if not given.
        process_sets: To be added, the same on every rank. Further ones may be added at any time: "dynamic", which
            Horovod wants for that, is accepted.
        settings: Same on every rank; read from the environment if not given.

    Raises:
        ValueError: Unusable ranks or process sets, or an environment variable of the settings with an unusable value.
        UnavailableError: MPI lacks the thread level that the progress thread needs.
    """
    global _world, _predecessor, _last_init  # noqa: PLW0603  (the one default communicator of the process)
    if _world is not None:
        return
    _world = World(Communicator.from_mpi(comm, settings=settings))
    _world.succeed(_predecessor)
    _predecessor = None
    global_process_set.mpi_comm = None if comm is None or isinstance(comm, Sequence) else comm
    try:
        made = _world.add([] if process_sets is None or process_sets == "dynamic" else process_sets)
    except Exception:
        shutdown()
        raise
    _last_init = functools.partial(init, comm, made, settings=settings)
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

    Returns at once, or when a timeline is written; `init` may be called again, by all ranks.
    """
    global _world, _predecessor
    if _world is None:
        return
    for process_set in list(_world.process_sets.values()):
        if process_set.negotiator is not None:
            # Takes along the negotiator, and the optimizers of the set.
            process_set.negotiator.group.leave("has shut down")
        _world.forget(process_set)
    global_process_set.ranks = global_process_set.mpi_comm = None
    _world.comm.timeline.finish()
    _world.comm.engine.close()
    _predecessor, _world = _world, None


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


def negotiators() -> list[Negotiator]:
    """Return what runs the named operations of each process set that includes this rank; that of all ranks first.

    Raises:
        NotInitializedError: Before `init`.
    """
    process_sets = _initialized().process_sets.values()
    return [process_set.negotiator for process_set in process_sets if process_set.negotiator is not None]


def add_process_set(process_set: ProcessSet | Iterable[int] | MPI.Comm) -> ProcessSet:
    """Make a process set usable. Every rank must call, the ranks outside the set too.

    Args:
        process_set: The same on every rank. If it is, or was made from, an mpi4py communicator, each rank passes the
            one that it belongs to, and all of these become sets.

    Raises:
        NotInitializedError: Before `init`.
        ValueError: Ranks out of range or repeated, a set of these ranks exists, or ranks passed different sets;
            on every rank.
    """
    (made,) = _initialized().add([process_set])
    return made


def remove_process_set(process_set: ProcessSet) -> bool:
    """Forget a process set. Every rank must call, when no operation of the set is in flight.

    Returns:
        Whether there was one; False for the global set.

    Raises:
        NotInitializedError: Before `init`.
        ValueError: Ranks want different sets removed; on every rank.
    """
    current = _initialized()
    number = process_set.process_set_id if process_set in current.process_sets.values() else None
    numbers = current.comm.allgather_obj(None if process_set is global_process_set else number)
    for removed in agreed_removals(numbers, current.process_sets):
        current.free(current.process_sets[removed])
    return numbers[current.comm.rank] is not None


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


def _initialized() -> World:
    if _world is None:
        raise _not_initialized()
    return _world


def _not_initialized() -> NotInitializedError:
    return NotInitializedError("mpitrain has not been initialized; call mpitrain.torch.init() first")
