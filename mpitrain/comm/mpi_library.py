"""The MPI library that this process runs on: which it is, what it can do; the end of a job without a communicator."""

from __future__ import annotations

import ctypes
import dataclasses
from pathlib import Path

from mpitrain.comm.start import MPI

__all__ = ["LibraryFacts", "abort_job", "library_facts", "library_name_and_version"]

_THREAD_LEVELS = {
    MPI.THREAD_SINGLE: "single",
    MPI.THREAD_FUNNELED: "funneled",
    MPI.THREAD_SERIALIZED: "serialized",
    MPI.THREAD_MULTIPLE: "multiple",
}
# Since MPI 4.1 a library may tell whose memory it takes.
_MEMORY_KINDS = "mpi_memory_alloc_kinds"
_MAPPED = "/proc/self/maps"


@dataclasses.dataclass(frozen=True)
class LibraryFacts:
    """What the library says of itself.

    Attributes:
        title: Name and version, such as "Open MPI 5.0.11".
        standard: Version of MPI, such as "3.1".
        thread_level: "single" to "multiple"; the last is what mpitrain needs.
        has_ulfm: It has the calls by which ranks go on without one that has failed.
        is_cuda_aware: It takes buffers in device memory; None if it does not say.
        cuda_source: How that was found out.
        can_share: It gives memory that the ranks of a node share.
    """

    title: str
    standard: str
    thread_level: str
    has_ulfm: bool
    is_cuda_aware: bool | None
    cuda_source: str
    can_share: bool


def library_facts() -> LibraryFacts:
    """Ask the library; this rank asks for itself, and no other has to."""
    is_cuda_aware, cuda_source = _cuda_awareness()
    return LibraryFacts(
        title=" ".join(library_name_and_version()),
        standard=".".join(map(str, MPI.Get_version())),
        thread_level=_THREAD_LEVELS[MPI.Query_thread()],
        has_ulfm=_has_ulfm(),
        is_cuda_aware=is_cuda_aware,
        cuda_source=cuda_source,
        can_share=_can_share(),
    )


def abort_job() -> None:
    """End all ranks at once, with a failure; nothing if MPI has ended, or this process is the only rank."""
    if MPI.Is_initialized() and not MPI.Is_finalized() and MPI.COMM_WORLD.Get_size() > 1:
        MPI.COMM_WORLD.Abort(1)


def library_name_and_version() -> tuple[str, str]:
    """Return such as ("Open MPI", "5.0.11")."""
    name, version = MPI.get_vendor()
    return name, ".".join(map(str, version))


def _has_ulfm() -> bool:
    comm = MPI.COMM_SELF.Dup()
    try:
        comm.Is_revoked()
    except NotImplementedError:
        return False
    finally:
        comm.Free()
    return True


def _cuda_awareness() -> tuple[bool | None, str]:
    info = MPI.COMM_WORLD.Get_info()
    kinds = info.Get(_MEMORY_KINDS)
    info.Free()
    if kinds:
        return "cuda" in kinds, f"its {_MEMORY_KINDS} are {kinds}"
    query = _find_function("MPIX_Query_cuda_support")
    if query is not None:
        return bool(query()), "MPIX_Query_cuda_support says so"
    return None, "it has neither memory kinds nor MPIX_Query_cuda_support"


def _find_function(name: str) -> ctypes._NamedFuncPointer | None:
    """Return a function of the library, which is among the files that this process has mapped."""
    try:
        lines = Path(_MAPPED).read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:  # not Linux
        return None
    paths = dict.fromkeys(words[5] for line in lines if len(words := line.split(None, 5)) == 6)
    for path in paths:
        if Path(path).name.startswith(("libmpi.so", "libmpich.so", "libmpi_")):
            function: ctypes._NamedFuncPointer | None = getattr(ctypes.CDLL(path), name, None)
            if function is not None:
                return function
    return None


def _can_share() -> bool:
    try:
        window = MPI.Win.Allocate_shared(1, 1, comm=MPI.COMM_SELF)
    except (MPI.Exception, NotImplementedError):
        return False
    window.Free()
    return True
