"""What happens when a process ends while others still count on it.

MPI's own end is collective: a rank that leaves after an exception waits for the others, who wait for it. So at exit
every communicator tells its ranks why this one leaves, which ends their waiting with an error, and a rank that
failed aborts the job if the others cannot be reached that way.
"""

from __future__ import annotations

import atexit
import logging
import sys
import weakref
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mpitrain.collectives.communicator import Communicator

__all__ = ["end_with_failure", "exit_reason", "watch_exit"]

_log = logging.getLogger("mpitrain")

# Time for the others to end by themselves after this rank has failed.
_PATIENCE_S = 10.0


class _ExitWatch:
    """The hooks of this process; there is one interpreter exit, so there is one of these."""

    def __init__(self) -> None:
        self.communicators: weakref.WeakSet[Communicator] = weakref.WeakSet()
        self.failure: BaseException | None = None
        self._is_installed = False

    def install(self) -> None:
        if self._is_installed:
            return
        self._is_installed = True
        previous = sys.excepthook

        def note_failure(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
            self.failure = error
            previous(kind, error, traceback)

        sys.excepthook = note_failure
        atexit.register(self.leave)

    def leave(self) -> None:
        communicators = [comm for comm in self.communicators if not comm.is_freed]
        reason = exit_reason()
        for comm in communicators:
            comm.leave(reason)
        for comm in communicators:
            comm.timeline.finish()
        if self.failure is not None:
            for comm in communicators:
                if not comm.await_departures(_PATIENCE_S):
                    sys.stderr.flush()
                    _log.error("r%d/%d | aborts the job: this rank %s", comm.rank, comm.size, reason)
                    comm.transport.abort()
        for comm in communicators:
            comm.engine.abandon()


_watch = _ExitWatch()


def watch_exit(comm: Communicator) -> None:
    """Let a communicator's ranks know when and why this process ends."""
    _watch.install()
    _watch.communicators.add(comm)


def end_with_failure(error: BaseException) -> None:
    """Let the others know, when this process ends, that it was with this error; for whoever runs programs.

    Where this process has started MPI and has no communicator by which it could tell, the job is aborted at once.
    """
    _watch.failure = error
    if not _watch.communicators and "mpi4py.MPI" in sys.modules:
        from mpitrain.comm.mpi_library import abort_job

        abort_job()


def exit_reason() -> str:
    """Return why this process ends, as it continues the words "rank 3"."""
    if _watch.failure is None:
        return "has finished"
    return f"has failed with {type(_watch.failure).__name__}: {_watch.failure}"
