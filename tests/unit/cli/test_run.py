from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.limits import HANG_S

REPOSITORY = Path(__file__).parents[3]
MPIRUN = shutil.which("mpirun", path=str(Path(sys.executable).parent)) or shutil.which("mpirun")

needs_mpirun = pytest.mark.skipif(MPIRUN is None, reason="needs an mpirun beside Python or in PATH")


def environment(**variables: str) -> dict[str, str]:
    launched = ("OMPI_", "PMIX_", "PMI_", "PRTE_", "MPITRAIN_", "SLURM_")
    environ = {name: value for name, value in os.environ.items() if not name.startswith(launched)}
    return environ | {
        "OMP_NUM_THREADS": "1",
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "PYTHONPATH": str(REPOSITORY),
        **variables,
    }


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "mpitrain", "run", *map(str, arguments)]


def run(*arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments),
        env=environment(**variables),
        timeout=HANG_S,
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )


@pytest.fixture
def srun(tmp_path):
    """A folder with a stand-in for Slurm's srun, which runs the ranks on this machine and notes its arguments."""
    path = tmp_path / "bin" / "srun"
    path.parent.mkdir()
    path.write_text(
        f"#!{sys.executable}\n"
        "import json, os, subprocess, sys\n"
        "if sys.argv[1:] == ['--version']: sys.exit(print('slurm 23.11.4'))\n"
        f"json.dump(sys.argv[1:], open({str(tmp_path / 'arguments')!r}, 'w'))\n"
        "options = [word for word in sys.argv[1:sys.argv.index('-ISs') - 1]]\n"
        "program = sys.argv[1 + len(options):]\n"
        "size = next(int(word.partition('=')[2]) for word in options if word.startswith('--ntasks='))\n"
        "ranks = [subprocess.Popen(program, env={**os.environ, 'SLURM_PROCID': str(r)}) for r in range(size)]\n"
        "sys.exit(max(rank.wait() for rank in ranks))\n"
    )
    path.chmod(0o755)
    return path.parent


def test_dry_run_prints_a_command_and_runs_nothing(srun, tmp_path):
    evil = ["a b", "; touch evil", "$(touch evil)", ":"]
    variables = {"PATH": f"{srun}:{os.environ['PATH']}"}
    arguments = ["--launcher", "slurm", "-H", "node0:2,node1:2", "--dry-run", "python", "train.py", *evil]
    done = run(*arguments, **variables)
    assert (done.returncode, done.stderr) == (0, "")
    words = shlex.split(done.stdout)
    assert words[:3] == [str(srun / "srun"), "--ntasks=4", "--nodes=2"]
    assert words[-6:] == ["python", "train.py", "a b", "; touch evil", "$(touch evil)", "\\:"]
    assert not (tmp_path / "arguments").exists()


def test_slurm_runs_the_ranks_and_the_first_failure_is_the_status(srun):
    program = (
        "import os, sys, time; rank = int(os.environ['SLURM_PROCID'])\n"
        "print('up', os.environ['MPITRAIN_ALGORITHM'], os.environ['MPITRAIN_TIMELINE'])\n"
        "time.sleep(0.2 * (2 - rank)); sys.exit((9, 0, 7)[rank])"
    )
    options = ["--launcher", "slurm", "-np", 3, "--oversubscribe", "--algorithm", "ring", "--timeline", "t.json"]
    done = run(*options, sys.executable, "-c", program, PATH=f"{srun}:{os.environ['PATH']}")
    assert sorted(done.stdout.splitlines()) == [f"[{rank}] up ring {Path.cwd() / 't.json'}" for rank in range(3)]
    assert done.returncode == 7
    assert done.stderr.startswith("mpitrain: rank 2 on ")
    assert done.stderr.endswith(" ended first with a failure, status 7; the others were stopped\n")


@pytest.mark.parametrize(
    ("arguments", "variables", "message"),
    [
        (
            ["-H", "node0:2;reboot", "python"],
            {},
            "hosts 'node0:2;reboot': slots must be a number from 1, got '2;reboot'",
        ),
        (["-H", "-oProxyCommand=x", "python"], {}, "is no host name or IPv4 address, got '-oProxyCommand=x'"),
        (["-H", "no-such-host.invalid:2", "python"], {}, "hosts: unknown, got no-such-host.invalid; correct"),
        (["-np", "5", "-H", "localhost:2", "python"], {}, "more than there are slots, got 5 for 2"),
        (["-np", "100000", "python"], {}, "ranks: more than this machine has cores, got 100000"),
        (["--hostfile", "nowhere", "python"], {}, "hostfile nowhere: cannot be read, No such file or directory"),
        (["--hostfile", "HOSTFILE", "python"], {}, "hosts, line 2: slots must be a number from 1, got 'x'"),
        (["-np", "1", "--launcher", "intelmpi", "python"], {}, "none of Intel MPI found"),
        (["python", "train.py"], {}, "the number of ranks is not known"),
        (["-np", "1"], {}, "no program, got only options"),
        (["-np", "1", "-x", "NOT_SET", "python"], {}, "variable NOT_SET: is not set"),
        (["-np", "1", "-x", "A B=1", "python"], {}, "variable: must have a name of letters"),
        (["-np", "1", "python"], {"MPITRAIN_WAIT": "long"}, "MPITRAIN_WAIT: must be auto, spin or sleep, got 'long'"),
        (["-np", "1", "python"], {"OMPI_COMM_WORLD_RANK": "0"}, "cannot start a job within a job"),
    ],
)
def test_bad_input_is_one_line_and_status_2(tmp_path, srun, arguments, variables, message):
    hostfile = tmp_path / "hosts"
    hostfile.write_text("node0 slots=2\nnode1 slots=x\n")
    arguments = [str(hostfile) if word == "HOSTFILE" else word for word in arguments]
    # A launcher is found whatever else is installed.
    done = run(*arguments, **{"PATH": f"{os.environ['PATH']}:{srun}", **variables})
    assert done.returncode == 2
    assert done.stdout == ""
    assert message in done.stderr
    assert done.stderr.startswith("mpitrain: ")
    assert done.stderr.count("\n") == 1


def test_no_launcher_is_one_line_and_status_2(tmp_path):
    # A copy of Python by itself, with nothing beside it.
    python = tmp_path / "python"
    python.symlink_to(sys.executable)
    program = (
        "import sys; sys.executable = sys.argv[1]; sys.argv[1:] = sys.argv[2:]; from mpitrain.cli import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(python), "run", "-np", "1", "python"],
        env=environment(PATH=str(tmp_path)),
        capture_output=True,
        text=True,
        timeout=HANG_S,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"mpitrain: mpirun: none found beside {python} or in PATH, got nothing; load")
    assert done.stderr.count("\n") == 1


@needs_mpirun
def test_ranks_get_arguments_and_variables_as_they_are(tmp_path):
    program = "import json, os, sys; print(json.dumps([sys.argv[1:], os.environ['FIRST'], os.environ['SECOND']]))"
    evil = [
        "; touch evil",
        "$(touch evil)",
        "`touch evil`",
        "| touch evil",
        ":",
        "touch",
        "evil",
        "",
        "a\nb",
        "-np",
        "3",
    ]
    done = subprocess.run(
        command("-np", 1, "-x", "FIRST", "-x", "SECOND=$(touch evil); x", sys.executable, "-c", program, *evil),
        env=environment(FIRST="a b"),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=HANG_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.removeprefix("[0] ")) == [evil, "a b", "$(touch evil); x"]
    assert list(tmp_path.iterdir()) == []


@needs_mpirun
def test_a_failing_rank_ends_the_others_and_gives_the_status(tmp_path):
    program = (
        "import os, sys, time; from mpi4py import MPI; print('up', flush=True); MPI.COMM_WORLD.Barrier()\n"
        "if MPI.COMM_WORLD.rank: os._exit(7)\n"
        "time.sleep(60)"
    )
    done = run("-np", 2, "--oversubscribe", sys.executable, "-c", program)
    assert done.returncode == 7
    # MPICH has something to say itself.
    assert {"[0] up", "[1] up"} <= set(done.stdout.splitlines())
    assert "mpitrain: rank 1 on " in done.stderr


@needs_mpirun
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_ends_everything(tmp_path, number):
    program = (
        "import os, pathlib, sys, time; from mpi4py import MPI; MPI.COMM_WORLD.Barrier()\n"
        "pathlib.Path(sys.argv[1], str(os.getpid())).touch(); time.sleep(60)"
    )
    (tmp_path / "pids").mkdir()
    job = subprocess.Popen(
        command("-np", 2, "--oversubscribe", sys.executable, "-c", program, tmp_path / "pids"), env=environment()
    )
    while len(list((tmp_path / "pids").iterdir())) < 2:
        assert job.poll() is None
        time.sleep(0.02)
    job.send_signal(number)
    assert job.wait(timeout=HANG_S) == 128 + number
    for path in (tmp_path / "pids").iterdir():
        while Path("/proc", path.name).exists():
            time.sleep(0.02)


@needs_mpirun
def test_a_script_written_for_horovod(tmp_path):
    script = tmp_path / "train.py"
    script.write_text("import sys, horovod.torch as hvd; hvd.init(); print(hvd.rank(), hvd.size(), sys.argv[1:])")
    done = run("-np", 2, "--oversubscribe", "--horovod", script, "--epochs", 3)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == ["[0] 0 2 ['--epochs', '3']", "[1] 1 2 ['--epochs', '3']"]
