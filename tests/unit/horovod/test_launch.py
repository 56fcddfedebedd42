"""`python -m mpitrain.horovod` against `python`: what a program sees, and how it ends."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
MPIRUN = shutil.which("mpirun", path=str(Path(sys.executable).parent)) or shutil.which("mpirun")
LIMIT_S = 60

needs_mpirun = pytest.mark.skipif(MPIRUN is None, reason="needs an mpirun beside Python or in PATH")

PROBE = """
import sys
main = sys.modules["__main__"]
assert vars(main) is globals()
print(sys.argv, sys.path[0], __name__, globals().get("__file__"), __package__, globals().get("__cached__"))
print(__spec__ and (__spec__.name, __spec__.origin), type(__loader__), __builtins__)
# The annotations of a module are made when they are first asked for, since Python 3.14.
print(sorted(vars(main).keys() - {"__annotations__"}))
"""


def run(
    folder: Path, *arguments: object, launcher: tuple[object, ...] = (), **more: str
) -> subprocess.CompletedProcess[str]:
    launched = ("OMPI_", "PMIX_", "PMI_", "PRTE_", "MPITRAIN_", "PYTHONPATH", "PYTHONSAFEPATH")
    environ = {name: value for name, value in os.environ.items() if not name.startswith(launched)}
    environ |= {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "OMPI_MCA_osc": "^ucx",
        "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
        **more,
    }
    return subprocess.run(
        [*map(str, launcher), sys.executable, *map(str, arguments)],
        cwd=folder,
        env=environ,
        timeout=LIMIT_S,
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Programs, as files, modules and packages."""
    for name in ("probe.py", "below/probe.py", "below/__main__.py", "package/__init__.py", "package/part.py"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("" if path.name == "__init__.py" else PROBE)
    (tmp_path / "link.py").symlink_to(tmp_path / "below" / "probe.py")
    return tmp_path


@pytest.mark.parametrize(
    "program",
    [
        ["below/probe.py", "-m", "x", "--epochs=3"],
        ["link.py", "a b"],
        ["-m", "below", "x"],
        ["-m", "package.part", "-h"],
        ["-c", PROBE, "x", "-c"],
    ],
    ids=["script with arguments", "link", "module", "module of a package", "code"],
)
def test_a_program_finds_what_python_gives_it(folder: Path, program: list[str]) -> None:
    plain = run(folder, *program)
    assert plain.returncode == 0, plain.stderr
    ours = run(folder, "-m", "mpitrain.horovod", *program)
    assert ours.returncode == 0, ours.stderr
    assert ours.stdout == plain.stdout


@pytest.mark.skipif(sys.version_info < (3, 11), reason="python -P is new in Python 3.11")
def test_a_safe_path_stays_safe(folder: Path) -> None:
    program = "import sys, horovod; print(sys.path[1:])"
    done = run(folder, "-P", "-m", "mpitrain.horovod", "-c", program)
    assert done.returncode == 0, done.stderr
    assert str(folder) not in done.stdout


ENDINGS = {
    "error": "def f():\n    1 / 0\nf()",
    "chain": "try:\n    {}['a']\nexcept KeyError as error:\n    raise ValueError('b') from error",
    "message": "import sys\nsys.exit('no data')",
    "good end": "import sys\nsys.exit()",
    "syntax": "x = = 3",
    "import": "import nowhere",
    "hook": "import sys\nsys.excepthook = lambda *parts: print('hooked', parts[0])\nraise OSError",
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_program_ends_as_under_python(tmp_path: Path, ending: str) -> None:
    (tmp_path / "ending.py").write_text(ENDINGS[ending])
    plain = run(tmp_path, "ending.py")
    ours = run(tmp_path, "-m", "mpitrain.horovod", "ending.py")
    assert (ours.returncode, ours.stdout, ours.stderr) == (plain.returncode, plain.stdout, plain.stderr)


def test_an_interrupt_ends_as_under_python(tmp_path: Path) -> None:
    done = run(tmp_path, "-m", "mpitrain.horovod", "-c", "raise KeyboardInterrupt")
    assert done.returncode == -signal.SIGINT
    assert "KeyboardInterrupt" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        ([], 2, "no program is named"),
        (["-m"], 2, "-m: an argument is missing"),
        (["-u", "train.py"], 2, "unknown option -u; options of Python itself go before its -m"),
        (["nowhere.py"], 2, "can't open file '{folder}/nowhere.py'"),
        (["-m", "nowhere"], 1, "No module named nowhere"),
        (["-m", "nowhere.below"], 1, "No module named 'nowhere'"),
    ],
)
def test_a_command_line_that_names_no_program(tmp_path: Path, arguments: list[str], status: int, words: str) -> None:
    done = run(tmp_path, "-m", "mpitrain.horovod", *arguments)
    assert done.returncode == status
    assert words.format(folder=tmp_path) in done.stderr
    assert done.stderr.startswith("usage: mpirun -np N python -m mpitrain.horovod")
    assert "Traceback" not in done.stderr


def test_help(tmp_path: Path) -> None:
    done = run(tmp_path, "-m", "mpitrain.horovod", "--help")
    assert done.returncode == 0
    assert "SCRIPT | -m MODULE | -c CODE" in done.stdout


@needs_mpirun
@pytest.mark.parametrize("failure", ["sys.exit(3)", "raise KeyError('batch 17')"])
def test_a_rank_that_fails_ends_all_ranks_whatever_they_wait_for(tmp_path: Path, failure: str) -> None:
    (tmp_path / "train.py").write_text(
        "import sys\n"
        "from mpi4py import MPI\n"
        "import horovod.torch as hvd\n"
        "if MPI.COMM_WORLD.rank == 1:\n"
        f"    {failure}\n"
        "hvd.init()\n"
        "MPI.COMM_WORLD.Recv(bytearray(1), source=1)\n"
    )
    done = run(tmp_path, "-m", "mpitrain.horovod", "train.py", launcher=(MPIRUN, "-np", 2))
    assert done.returncode != 0
    assert ("KeyError: 'batch 17'" in done.stderr) == ("KeyError" in failure)
