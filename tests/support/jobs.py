"""Python programs as users start them: in processes of their own, on one rank or on several."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.limits import HANG_S

__all__ = ["MPIRUN", "REPOSITORY", "needs_mpirun", "run_python"]

REPOSITORY = Path(__file__).parents[2]
# Less than the time limits of tests, so that a hang is reported with what was printed.
MPIRUN = shutil.which("mpirun", path=str(Path(sys.executable).parent)) or shutil.which("mpirun")

needs_mpirun = pytest.mark.skipif(MPIRUN is None, reason="needs an mpirun beside Python or in PATH")


def run_python(
    *arguments: object, size: int = 1, folder: Path | None = None, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run `python` with arguments, on one rank without `mpirun`; the package is that of this repository.

    Args:
        arguments: Of Python.
        size: Number of ranks.
        folder: Where to run it.
        variables: Of the environment, beside those that are there.
    """
    # Launchers have more to say to a process that one of them has started.
    inherited = ("OMPI_", "PMIX_", "PMI_", "PRTE_", "MPITRAIN_", "HOROVOD_", "PYTHONPATH", "PYTHONSAFEPATH")
    environ = {name: value for name, value in os.environ.items() if not name.startswith(inherited)}
    environ |= {
        "PYTHONPATH": str(REPOSITORY),
        "OMP_NUM_THREADS": "1",
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "OMPI_MCA_osc": "^ucx",
        "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
        "PRTE_MCA_hwloc_default_binding_policy": "none",
        **variables,
    }
    launcher = [] if size == 1 else [str(MPIRUN), "-np", str(size)]
    return subprocess.run(
        [*launcher, sys.executable, *map(str, arguments)],
        cwd=folder,
        env=environ,
        timeout=HANG_S,
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )
