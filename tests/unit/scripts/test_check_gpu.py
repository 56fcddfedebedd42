"""scripts/check_gpu where there is no GPU: its arithmetic, its summary, and its jobs on the stand-in for CuPy."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.fake_cupy import FOLDER
from tests.support.host_kernels import needs_compiler
from tests.support.jobs import needs_mpirun, run_python

SCRIPTS = Path(__file__).parents[3] / "scripts"


@pytest.fixture
def gpu(monkeypatch):
    """Return the function that imports a module of scripts/gpu."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    yield lambda name: importlib.import_module(f"gpu.{name}")
    for name in [name for name in sys.modules if name.partition(".")[0] == "gpu"]:
        del sys.modules[name]


def test_limits(gpu):
    limits = gpu("limits")
    # Two ranks share a device: 1000 bytes of each are read and written, which passes 4000 bytes.
    assert limits.direct_limit_s(1000, 2, 8000.0) == pytest.approx(0.5)
    assert limits.direct_limit_s(1000, 1, 8000.0) == pytest.approx(0.25)
    assert limits.staged_limit_s(1000, 500.0, 250.0, 3.0) == pytest.approx(4.0)
    assert limits.staged_limit_s(1000, 500.0, 2000.0, 1.0) == pytest.approx(2.0)
    assert limits.staged_limit_s(1000, 500.0, 500.0, 3.0) == pytest.approx(3.0)
    assert limits.share_of_limit(2.0, 2.5) == pytest.approx(0.8)


def test_waits_are_counted_within_steps_only(gpu):
    synchronizations = gpu("synchronizations")
    span = synchronizations.Span
    steps = [span("step", 10, 20), span("step", 30, 40)]
    events = [
        span("cudaDeviceSynchronize", 5, 6),
        span("cudaDeviceSynchronize", 19, 21),
        span("cudaStreamSynchronize", 12, 13),
        span("cudaStreamSynchronize", 30, 40),
        span("cudaLaunchKernel", 14, 15),
    ]
    counted = {"cudaDeviceSynchronize": 0, "cudaStreamSynchronize": 2}
    assert synchronizations.count_waits(events, steps) == counted
    events += [span("cudaDeviceSynchronize", 31, 32), span("cuCtxSynchronize", 33, 34)]
    assert synchronizations.count_waits(events, steps) == {**counted, "cudaDeviceSynchronize": 2}


def row(path="direct", *, time_s=0.010, limit_s=0.009):
    return {"path": path, "ranks": 2, "nbytes": 256 << 20, "time_s": time_s, "limit_s": limit_s}


def test_table(gpu):
    lines = gpu("summary").table_of([row(), row("host array", limit_s=None)]).split("\n")
    assert [line.split() for line in lines[1:]] == [
        ["2", "direct", "256", "10.000", "9.000", "90%"],
        ["2", "host", "array", "256", "10.000", "-", "-"],
    ]
    assert len({len(line) for line in lines}) == 1


def test_failures_are_what_is_slow_waits_or_ended_badly(gpu):
    failures_of = gpu("summary").failures_of
    good = {
        "parts": [{"name": "tests", "status": 0}],
        "rows": [row(time_s=0.0112), row("CUDA-aware", limit_s=None)],
        "profiles": [{"ranks": 2, "waits": {"cudaDeviceSynchronize": 0, "cudaStreamSynchronize": 4}}],
    }
    assert failures_of(good) == []
    bad = {
        "parts": [{"name": "tests", "status": 1}],
        "rows": [row(time_s=0.0125)],
        "profiles": [{"ranks": 4, "waits": {"cudaDeviceSynchronize": 3}}],
    }
    assert failures_of(bad) == [
        "tests ended with status 1",
        "direct on 2 ranks reached 72% of its limit",
        "training steps on 4 ranks waited 3 times for the whole device",
    ]


def test_parts_are_merged_in_order(gpu, tmp_path):
    (tmp_path / "b.json").write_text(json.dumps({"rows": [2], "devices": "one"}))
    (tmp_path / "a.json").write_text(json.dumps({"rows": [1], "profiles": [3]}))
    assert gpu("summary").merge(tmp_path) == {"rows": [1, 2], "profiles": [3], "devices": "one"}


def test_every_part_is_a_job_of_its_own(gpu, tmp_path):
    parts = list(gpu("check").parts_of(tmp_path, 1 << 20))
    assert len({part.name for part in parts}) == len(parts)
    assert [part.ranks for part in parts if "tests/mpi" in part.arguments] == [1, 2, 4]
    files = [argument for part in parts for argument in part.arguments if argument.endswith(".py")]
    assert files
    assert all(Path(file).is_file() for file in files)


@needs_mpirun
@needs_compiler
def test_measurements_run_on_the_stand_in(tmp_path):
    path = tmp_path / "rows.json"
    path_of_jobs = os.pathsep.join(map(str, [FOLDER, SCRIPTS, SCRIPTS.parent]))
    variables = {"PYTHONPATH": path_of_jobs, "MPITRAIN_CUDA_AWARE": "no"}
    sizes = ("--nbytes", 2 << 20, "--iterations", 2)
    done = run_python(SCRIPTS / "gpu/measure.py", *sizes, "--json", path, size=2, **variables)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(path.read_text())
    assert [(row["path"], row["ranks"], row["ranks_per_device"]) for row in result["rows"]] == [
        ("direct", 2, 2),
        ("through device memory", 2, 2),
        ("staged", 2, 2),
        ("host array", 2, 2),
    ]
    assert all(row["time_s"] > 0 for row in result["rows"])
    assert min(result["rates"][0].values()) > 0


def test_machine_without_a_gpu_is_told_in_one_line(tmp_path):
    # No command of NVIDIA's is on this path.
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    variables = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run([SCRIPTS / "check_gpu"], env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 77
    assert done.stdout == ""
    assert done.stderr.startswith("check_gpu: this machine has no NVIDIA GPU")
    assert done.stderr.count("\n") == 1
