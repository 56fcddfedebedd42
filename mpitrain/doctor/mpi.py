"""What the MPI library can do."""

from __future__ import annotations

import subprocess
import sys

from mpitrain.config import copy_environment
from mpitrain.doctor.findings import Finding

__all__ = ["check_mpi", "why_mpi_does_not_start"]

_LIMIT_S = 60.0


def why_mpi_does_not_start() -> str:
    """Start MPI in another process, which it may end; return what went wrong, "" if nothing."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", "from mpi4py import MPI"],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_LIMIT_S,
            check=False,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired:
        return f"it does not start within {_LIMIT_S:.0f} s"
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip(" -")]
    return "" if done.returncode == 0 else lines[-1] if lines else f"it ends with status {done.returncode}"


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
    aware, source = facts.is_cuda_aware, facts.cuda_source
    gpu_of_cray = copy_environment().get("MPICH_GPU_SUPPORT_ENABLED")
    if gpu_of_cray is not None:
        source += f"; MPICH_GPU_SUPPORT_ENABLED={gpu_of_cray} in the environment"
    says = {True: "yes", False: "no, device arrays would go through the host", None: "unknown"}[aware]
    return [*findings, Finding("CUDA-aware MPI", "ok", f"{says}: {source}; not tried")]


def _ulfm(title: str, *, has_ulfm: bool) -> Finding:
    if not has_ulfm:
        return Finding("ULFM", "ok", "no: a rank that fails ends the job")
    if title.startswith("Open MPI") and copy_environment().get("OMPI_MCA_mpi_ft_enable") != "1":
        return Finding("ULFM", "ok", "built in, and off: mpirun --with-ft ulfm lets ranks survive the failure of one")
    return Finding(
        "ULFM", "ok", "built in; MPICH needs mpiexec -disable-auto-cleanup for ranks to survive another's end"
    )
