"""Starts MPI: to import `MPI` from here does. The modules of this package take it from nowhere else."""

from __future__ import annotations

from mpitrain.config import prepare_mpi_wheel

# Before the library reads the environment, which it does once.
prepare_mpi_wheel()

from mpi4py import MPI  # noqa: E402

__all__ = ["MPI"]
