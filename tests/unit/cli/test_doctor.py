from __future__ import annotations

import json
import shutil
import subprocess
import sys

from tests.support.limits import HANG_S
from tests.unit.cli.test_run import MPIRUN, environment, needs_mpirun


def doctor(*arguments: object, launcher: tuple[object, ...] = (), **variables: str):
    return subprocess.run(
        [*map(str, launcher), sys.executable, "-m", "mpitrain", "doctor", *map(str, arguments)],
        env=environment(PRTE_MCA_rmaps_default_mapping_policy=":oversubscribe", **variables),
        timeout=HANG_S,
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
    # Settings that cannot be used.
    done = doctor(MPITRAIN_WAIT="long")
    assert done.returncode == 1
    assert "failure  settings" in done.stdout
    assert "-> correct the variable" in done.stdout
    assert done.stdout.endswith("training cannot run here: 1 failures\n")
    assert "Traceback" not in done.stderr


def test_an_mpi_library_that_is_not_there():
    done = doctor("--json", MPI4PY_LIBMPI="/nowhere/libmpi.so")
    report = json.loads(done.stdout)
    library = next(finding for finding in report["findings"] if finding["name"] == "MPI library")
    assert done.returncode == 1
    assert library["status"] == "failure"
    assert library["text"].startswith("does not start: ")
    assert "load the module" in library["remedy"]


def test_a_hostfile_that_cannot_be_read_is_one_line():
    done = doctor("--hostfile", "nowhere")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("mpitrain: hostfile nowhere: cannot be read")
    assert done.stderr.count("\n") == 1


@needs_mpirun
def test_under_mpirun_the_odd_rank_is_named():
    # Each rank is a shell that sets a variable of its own.
    shell = 'rank=${OMPI_COMM_WORLD_RANK:-$PMI_RANK}; ((rank != 1)) || export MPITRAIN_ALGORITHM=ring; exec "$@"'
    launcher = (MPIRUN, "-np", 3, shutil.which("bash"), "-c", shell, "shell")
    done = doctor("--json", launcher=launcher)
    report = json.loads(done.stdout)
    assert done.returncode == 1
    found = {finding["name"]: finding for finding in report["findings"]}
    assert found["ranks"]["text"].startswith("3 on 1 hosts")
    assert found["agreement"]["status"] == "failure"
    assert "setting algorithm: rank 1 on " in found["agreement"]["text"]
    assert found["agreement"]["text"].endswith(" has ring; most have auto")
    assert "cross memory attach" in found
