"""Which MPI library this process runs on, and which rank of the whole job it is."""

from __future__ import annotations

from mpi4py import MPI

__all__ = ["library_name_and_version", "rank_of_job"]


def library_name_and_version() -> tuple[str, str]:
    """Return such as ("Open MPI", "5.0.11")."""
    name, version = MPI.get_vendor()
    return name, ".".join(map(str, version))


def rank_of_job() -> int:
    """Return the rank in the world."""
    return MPI.COMM_WORLD.Get_rank()
