from __future__ import annotations

import importlib.metadata
import io
import json
import subprocess
import sys

import pytest
import rich.console

import mpitrain
from mpitrain.cli import console, tune_tables
from mpitrain.cli.tuning import COLLECTIVES, Measurement
from mpitrain.collectives.table import Key, Shape, Table
from mpitrain.schedules import ALGORITHMS
from tests.support.jobs import needs_mpirun, run_python
from tests.support.limits import HANG_S

PAIR = Shape(1, 2, 2, 2)


def start(*arguments: object, size: int = 1, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run the command on so many ranks; on one without mpirun."""
    return run_python("-m", "mpitrain", *arguments, size=size, **variables)


def messages_of(done: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in done.stderr.splitlines() if line.startswith("mpitrain:")]


def test_version_and_help_need_no_mpi():
    # A finder that refuses MPI stands for a machine that has none.
    program = (
        "import sys; sys.modules['mpi4py'] = None; sys.argv = ['mpitrain', {!r}]; from mpitrain.cli import main; main()"
    )
    version = subprocess.run(
        [sys.executable, "-c", program.format("--version")], capture_output=True, text=True, check=True, timeout=HANG_S
    )
    assert version.stdout == f"mpitrain, version {mpitrain.__version__}\n"
    listing = subprocess.run(
        [sys.executable, "-c", program.format("--help")], capture_output=True, text=True, check=True, timeout=HANG_S
    )
    assert "tune" in listing.stdout


def test_importing_the_command_starts_nothing():
    program = (
        "import sys, mpitrain.cli, mpitrain.cli.commands\n"
        "assert 'mpi4py.MPI' not in sys.modules and 'torch' not in sys.modules, sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=HANG_S)


@pytest.mark.parametrize("package", ["click", "rich"])
def test_missing_package_is_named_with_the_remedy(monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"got .*{package}.*; pip install mpitrain\[cli\]"):
        mpitrain.cli.main()


def test_entry_point_is_the_command():
    try:
        points = importlib.metadata.entry_points(group="console_scripts", name="mpitrain")
    except importlib.metadata.PackageNotFoundError:
        points = ()
    if not points:
        pytest.skip("mpitrain is not installed")
    assert {point.load() for point in points} == {mpitrain.cli.main}


def test_choices_of_the_command_are_collectives():
    assert set(COLLECTIVES) <= set(ALGORITHMS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tune", "--bogus"], "mpitrain: No such option '--bogus'"),
        (
            ["tune", "--max-size", "12X"],
            "mpitrain: Invalid value for '--max-size': must be a number of bytes, got '12X'",
        ),
        (["tune", "--collective", "allsum"], "mpitrain: Invalid value for '--collective'"),
        (["tune", "--minutes", "0"], "mpitrain: Invalid value for '--minutes'"),
        (["tune"], "mpitrain: ranks: need at least 2, got 1; use mpirun -np 2 mpitrain tune"),
        (["bench", "allgather"], "mpitrain: ranks: need at least 2, got 1; use mpirun -np 2 mpitrain bench allgather"),
        (["bench", "allsum"], "mpitrain: No such command 'allsum'"),
        (["bench", "allreduce", "--sizes", "-8:1K"], "mpitrain: Invalid value for '--sizes': must be a number of byt"),
        (["bench", "allreduce", "--sizes", "1M:1K"], "mpitrain: Invalid value for '--sizes': the smaller size comes"),
        (["bench", "allreduce", "--ops", "mean"], "mpitrain: op: unknown reduction, got 'mean'"),
        (["bench", "allreduce", "--memory", "disk"], "mpitrain: memory: unknown, got 'disk'"),
        (["explain", "allreduce", "fast"], "mpitrain: allreduce algorithm: unknown, got 'fast'"),
        (["report", "/nowhere/results.json"], "mpitrain: results: cannot be read, got"),
        (["simulate", "--fit", "/nowhere/results.json"], "mpitrain: results: cannot be read, got"),
        ([], "mpitrain: Missing command"),
    ],
)
def test_wrong_use_is_one_message_and_status_2(arguments, message):
    done = start(*arguments)
    assert done.returncode == 2
    (line,) = messages_of(done)
    assert line.startswith(message)
    assert "Traceback" not in done.stderr


@needs_mpirun
@pytest.mark.parametrize(
    ("arguments", "variables", "message"),
    [
        (["tune", "--bogus"], {}, "mpitrain: No such option"),
        (["tune"], {"MPITRAIN_WAIT": "never"}, "mpitrain: MPITRAIN_WAIT: must be auto, spin or sleep"),
        (["tune", "--output", "/dev/null/table.json"], {}, "mpitrain: table: cannot be stored"),
        (["bench", "allreduce", "--algorithms", "fast"], {}, "mpitrain: algorithm of allreduce: unknown, got 'fast'"),
    ],
)
def test_of_several_ranks_one_says_what_is_wrong(arguments, variables, message):
    done = start(*arguments, size=2, **variables)
    assert done.returncode == 2
    (line,) = messages_of(done)
    assert line.startswith(message)
    assert "Traceback" not in done.stderr


@needs_mpirun
def test_tuning_prints_and_stores_the_table(tmp_path):
    arguments = ("tune", "--quick", "--collective", "allreduce", "--max-size", "4K", "--minutes", "3")
    # A named file takes the table however busy the machine is.
    path = tmp_path / "folder" / "table.json"
    done = start(*arguments, "--times", "--output", path, size=2)
    assert done.returncode == 0, done.stderr
    assert list(path.parent.iterdir()) == [path]
    assert f"stored in {path}" in done.stdout
    assert "\x1b" not in done.stdout
    table = Table.from_json(json.loads(path.read_text()))
    assert {(key.collective, key.shape, key.blocking) for key in table.choices} == {
        ("allreduce", PAIR, True),
        ("allreduce", PAIR, False),
    }
    for steps in table.choices.values():
        assert steps[-1][0] == 4096
        assert all(name in done.stdout for _, name in steps)
    done = start(*arguments, "--dry-run", size=2, MPITRAIN_TUNE_DIR=str(tmp_path / "none"))
    assert done.returncode == 0, done.stderr
    assert "stored" not in done.stdout
    assert not (tmp_path / "none").exists()


class TestReport:
    KEYS = (Key("allreduce", PAIR, True), Key("allreduce", PAIR, False))

    def test_table_has_ranges_winners_and_leads(self):
        key = self.KEYS[0]
        rows = [
            Measurement(key, 8, {"native": 1.0, "ring": 3.0, "chain": 4.0}),
            Measurement(key, 64, {"native": 1.0, "ring": 2.0, "chain": 4.0}),
            Measurement(key, 512, {"ring": 1.0}),
        ]
        table = tune_tables.table_of_choices("title", {key: rows}, {key: ((181, "native"), (None, "ring"))})
        cells = [list(column.cells) for column in table.columns]
        assert cells[2:] == [
            ["181 B", "any size"],
            ["native", "ring"],
            ["2.00 - 3.00 x", "alone"],
            ["ring", ""],
        ]

    def test_times_that_were_not_taken_are_dashes(self):
        key = self.KEYS[0]
        rows = [Measurement(key, 8, {"native": 1e-5, "ring": 3e-5}), Measurement(key, 64, {"native": 2e-5})]
        table = tune_tables.table_of_times(key, rows)
        assert [list(column.cells) for column in table.columns] == [["8 B", "64 B"], ["10", "20"], ["30", "-"]]

    def test_progress_is_a_line_for_each_combination_in_a_file(self):
        console = rich.console.Console(file=io.StringIO(), force_terminal=False, width=100)
        with tune_tables.progress(console, self.KEYS, 2) as on_item:
            for key in self.KEYS:
                for nbytes in (8, 64):
                    on_item(key, nbytes)
        lines = console.file.getvalue().splitlines()
        assert [line.partition(": ")[2] for line in lines] == ["allreduce, blocking", "allreduce, in background"]

    def test_progress_is_a_bar_on_a_terminal(self, monkeypatch):
        monkeypatch.setenv("TERM", "xterm")
        console = rich.console.Console(file=io.StringIO(), force_terminal=True, width=100)
        with tune_tables.progress(console, self.KEYS, 2) as on_item:
            for key, nbytes in ((self.KEYS[0], 8), (self.KEYS[0], 64), (self.KEYS[1], 8), (self.KEYS[1], 64)):
                on_item(key, nbytes)
        # At the latest at the end it shows how far it has come.
        shown = console.file.getvalue()
        assert "allreduce, in background, 64 B" in shown
        assert "75%" in shown

    def test_output_that_nobody_sees_is_no_terminal(self, monkeypatch):
        monkeypatch.setattr(sys, "stdout", io.StringIO())
        assert not console.is_terminal()
