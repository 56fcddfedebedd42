"""`python -m mpitrain.horovod` against `python`: what a program sees, and how it ends."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import pytest

from tests.support.jobs import needs_mpirun, run_python

PROBE = """
import sys
main = sys.modules["__main__"]
assert vars(main) is globals()
print(sys.argv, sys.path[0], __name__, globals().get("__file__"), __package__, globals().get("__cached__"))
print(__spec__ and (__spec__.name, __spec__.origin), type(__loader__), __builtins__)
# The annotations of a module are made when they are first asked for, since Python 3.14.
print(sorted(vars(main).keys() - {"__annotations__"}))
"""


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
    plain = run_python(*program, folder=folder)
    assert plain.returncode == 0, plain.stderr
    ours = run_python("-m", "mpitrain.horovod", *program, folder=folder)
    assert ours.returncode == 0, ours.stderr
    assert ours.stdout == plain.stdout


@pytest.mark.skipif(sys.version_info < (3, 11), reason="python -P is new in Python 3.11")
def test_a_safe_path_stays_safe(folder: Path) -> None:
    program = "import sys, horovod; print(sys.path[1:])"
    done = run_python("-P", "-m", "mpitrain.horovod", "-c", program, folder=folder)
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
    plain = run_python("ending.py", folder=tmp_path)
    ours = run_python("-m", "mpitrain.horovod", "ending.py", folder=tmp_path)
    assert (ours.returncode, ours.stdout, ours.stderr) == (plain.returncode, plain.stdout, plain.stderr)


def test_an_interrupt_ends_as_under_python(tmp_path: Path) -> None:
    done = run_python("-m", "mpitrain.horovod", "-c", "raise KeyboardInterrupt", folder=tmp_path)
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
    done = run_python("-m", "mpitrain.horovod", *arguments, folder=tmp_path)
    assert done.returncode == status
    assert words.format(folder=tmp_path) in done.stderr
    assert done.stderr.startswith("usage: mpirun -np N python -m mpitrain.horovod")
    assert "Traceback" not in done.stderr


def test_help(tmp_path: Path) -> None:
    done = run_python("-m", "mpitrain.horovod", "--help", folder=tmp_path)
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
    done = run_python("-m", "mpitrain.horovod", "train.py", size=2, folder=tmp_path)
    assert done.returncode != 0
    assert ("KeyError: 'batch 17'" in done.stderr) == ("KeyError" in failure)
