"""The MPI library that this process runs on: which it is, what it can do; the end of a job without a communicator."""

from __future__ import annotations

import dataclasses

from mpitrain.comm.start import MPI

__all__ = ["LibraryFacts", "abort_job", "library_facts", "library_name_and_version"]

_THREAD_LEVELS = {
    MPI.THREAD_SINGLE: "single",
    MPI.THREAD_FUNNELED: "funneled",
    MPI.THREAD_SERIALIZED: "serialized",
    MPI.THREAD_MULTIPLE: "multiple",
}


@dataclasses.dataclass(frozen=True)
class LibraryFacts:
    """What the library says of itself.

    Attributes:
        title: Name and version, such as "Open MPI 5.0.11".
        standard: Version of MPI, such as "3.1".
        thread_level: "single" to "multiple"; the last is what mpitrain needs.
        has_ulfm: It has the calls by which ranks go on without one that has failed.
        can_share: It gives memory that the ranks of a node share.
    """

    title: str
    standard: str
    thread_level: str
    has_ulfm: bool
    can_share: bool


def library_facts() -> LibraryFacts:
    """Ask the library; this rank asks for itself, and no other has to."""
    return LibraryFacts(
        title=" ".join(library_name_and_version()),
        standard=".".join(map(str, MPI.Get_version())),
        thread_level=_THREAD_LEVELS[MPI.Query_thread()],
        has_ulfm=_has_ulfm(),
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


def _can_share() -> bool:
    try:
        window = MPI.Win.Allocate_shared(1, 1, comm=MPI.COMM_SELF)
    except (MPI.Exception, NotImplementedError):
        return False
    window.Free()
    return True
