"""What the MPI library can do."""

from __future__ import annotations

import sys

from mpitrain.config import Settings, copy_environment
from mpitrain.doctor.findings import Finding
from mpitrain.errors import UnavailableError
from mpitrain.memory.device import device_of
from mpitrain.programs import run_program

__all__ = ["check_mpi", "why_mpi_does_not_start"]

_LIMIT_S = 60.0


def why_mpi_does_not_start() -> str:
    """Start MPI in another process, which it may end; return what went wrong, "" if nothing."""
    try:
        done = run_program([sys.executable, "-c", "from mpi4py import MPI"], limit_s=_LIMIT_S)
    except TimeoutError:
        return f"it does not start within {_LIMIT_S:.0f} s"
    return done.last_words if done.status else ""


def check_mpi() -> list[Finding]:
    """Ask the library of this process; MPI must start."""
    from mpitrain.comm.mpi_library import library_facts

    facts = library_facts()
    needs = "leave mpi4py.rc.thread_level alone and start MPI through mpi4py, or use an MPI built with threads"
    findings = [
        Finding("MPI library", "ok", f"{facts.title}, MPI {facts.standard}"),
        Finding("thread level", "ok", facts.thread_level)
        if facts.thread_level == "multiple"
        else Finding("thread level", "failure", f"{facts.thread_level}, where multiple is needed", needs),
        Finding("shared windows", "ok", "the library gives memory that the ranks of a node share")
        if facts.can_share
        else Finding(
            "shared windows",
            "warning",
            "the library gives no memory that the ranks of a node share",
            "all works by messages, more slowly; look at /dev/shm and at how the library was built",
        ),
        _ulfm(facts.title, has_ulfm=facts.has_ulfm),
    ]
    return [*findings, _cuda_awareness()]


def _cuda_awareness() -> Finding:
    """Find out as training does, if there is a device; else tell what MPI says."""
    from mpitrain.collectives.awareness import find_awareness
    from mpitrain.collectives.table_file import Machine
    from mpitrain.comm.cuda_aware import what_mpi_says

    name = "CUDA-aware MPI"
    try:
        device = device_of(0)
    except UnavailableError:
        claim, source = what_mpi_says()
        says = {True: "yes", False: "no", None: "unknown"}[claim]
        return Finding(name, "ok", f"{says}: {source}; not tried, as there is no device")
    try:
        settings = Settings.from_environ()
    except ValueError:  # told when ranks are compared
        settings = Settings()
    found = find_awareness(Machine.of_mpi(), settings, device)
    if found.is_aware:
        return Finding(name, "ok", f"yes, device arrays go straight to MPI: {found.source}")
    return Finding(name, "ok", f"no, device arrays are staged through pinned memory: {found.source}")


def _ulfm(title: str, *, has_ulfm: bool) -> Finding:
    if not has_ulfm:
        return Finding("ULFM", "ok", "no: a rank that fails ends the job")
    if title.startswith("Open MPI") and copy_environment().get("OMPI_MCA_mpi_ft_enable") != "1":
        return Finding("ULFM", "ok", "built in, and off: mpirun --with-ft ulfm lets ranks survive the failure of one")
    return Finding(
        "ULFM", "ok", "built in; MPICH needs mpiexec -disable-auto-cleanup for ranks to survive another's end"
    )
