"""A message or collective of the MPI library under way."""

from __future__ import annotations

from typing import Any

from mpitrain.comm.start import MPI

__all__ = ["Request"]


class Request:
    """An MPI request, the memory it works on, and the length that a received message must have (else -1)."""

    __slots__ = ("buffers", "mpi", "nbytes")

    def __init__(self, mpi: MPI.Request, buffers: Any = None, nbytes: int = -1) -> None:
        self.mpi = mpi
        self.buffers = buffers  # kept alive while MPI uses them
        self.nbytes = nbytes
