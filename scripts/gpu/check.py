"""Runs every check of a machine with a GPU, one job after another, and writes one JSON and a table.

python scripts/gpu/check.py FOLDER [NBYTES]
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gpu.summary import failures_of, merge, table_of

_SCRIPTS = Path(__file__).resolve().parents[1]
_SIZES = (1, 2, 4)
_PART_LIMIT_S = 600
_DEFAULT_NBYTES = 256 << 20


class Part(NamedTuple):
    """A job: a name, a number of ranks, and what Python is to run."""

    name: str
    ranks: int
    arguments: tuple[str, ...]


def parts_of(folder: Path, nbytes: int) -> Iterator[Part]:
    """Yield all jobs; what they find out goes to files in `folder`."""
    tests = ("-m", "pytest", "--with-mpi", "-p", "no:cacheprovider", "-q", "-m", "gpu", "tests/mpi")
    for ranks in _SIZES:
        yield Part(f"tests, {ranks} ranks", ranks, tests)
    kernels = ("-m", "pytest", "-p", "no:cacheprovider", "-q", "-m", "gpu", "tests/unit/memory/device/kernels")
    yield Part("kernels", 1, kernels)
    for ranks in _SIZES[1:]:
        measure = (
            str(_SCRIPTS / "gpu/measure.py"),
            "--nbytes",
            str(nbytes),
            "--json",
            str(folder / f"rows-{ranks}.json"),
        )
        yield Part(f"measurements, {ranks} ranks", ranks, measure)
        steps = (str(_SCRIPTS / "gpu/profile_steps.py"), "--json", str(folder / f"profile-{ranks}.json"))
        yield Part(f"profile, {ranks} ranks", ranks, steps)
    for name, options in (("digits", ("--epochs", "3")), ("gpt", ("--steps", "60", "--report-steps", "60"))):
        script = str(_SCRIPTS / f"train_{name}.py")
        yield Part(f"{name} job, 2 ranks", 2, (script, "--device", "cuda", *options))


def run_part(part: Part) -> dict[str, Any]:
    """Run a job to its end; return its name, its exit status and how long it took."""
    print(f"== {part.name}", flush=True)
    # The ranks as well are to end with it.
    limit = ["timeout", "--kill-after=15", str(_PART_LIMIT_S)]
    command = [*limit, "mpirun", "-np", str(part.ranks), sys.executable, *part.arguments]
    begin_s = time.monotonic()
    status = subprocess.run(command, check=False, stdin=subprocess.DEVNULL).returncode
    return {"name": part.name, "status": status, "elapsed_s": round(time.monotonic() - begin_s, 1)}


def main(arguments: Sequence[str]) -> int:
    """Run all jobs; return 0 if everything is as it must be."""
    folder = Path(arguments[0])
    nbytes = int(arguments[1]) if len(arguments) > 1 else _DEFAULT_NBYTES
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.json"):
        old.unlink()
    # What the jobs import from beside the scripts.
    paths = [str(_SCRIPTS), str(_SCRIPTS.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    done = [run_part(part) for part in parts_of(folder, nbytes)]
    result = {"parts": done, **merge(folder)}
    result["failures"] = failures_of(result)
    (folder / "check_gpu.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(table_of(result.get("rows", [])))
    for failure in result["failures"]:
        print(f"FAILED: {failure}")
    print(f"everything is in {folder / 'check_gpu.json'}")
    return 1 if result["failures"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
