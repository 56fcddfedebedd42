"""Which MPI library this process runs on."""

from __future__ import annotations

from mpi4py import MPI

__all__ = ["library_name_and_version"]


def library_name_and_version() -> tuple[str, str]:
    """Return such as ("Open MPI", "5.0.11")."""
    name, version = MPI.get_vendor()
    return name, ".".join(map(str, version))
