"""The MPI library that this process runs on: which it is, and the end of a job that has no communicator."""

from __future__ import annotations

from mpi4py import MPI

__all__ = ["abort_job", "library_name_and_version"]


def abort_job() -> None:
    """End all ranks at once, with a failure; nothing if MPI has ended, or this process is the only rank."""
    if MPI.Is_initialized() and not MPI.Is_finalized() and MPI.COMM_WORLD.Get_size() > 1:
        MPI.COMM_WORLD.Abort(1)


def library_name_and_version() -> tuple[str, str]:
    """Return such as ("Open MPI", "5.0.11")."""
    name, version = MPI.get_vendor()
    return name, ".".join(map(str, version))
