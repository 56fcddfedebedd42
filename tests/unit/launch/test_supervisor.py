from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from mpitrain.errors import LaunchError
from mpitrain.launch import supervisor
from mpitrain.launch.supervisor import Failure, Outcome, run_job

TOKEN = "mpitrain-0123"


def run(source: str, *arguments: object) -> Outcome:
    """Watch over a launcher that is a Python program."""
    return run_job([sys.executable, "-c", source, *map(str, arguments)], dict(os.environ), TOKEN, size=3)


def test_output_goes_on_and_the_status_is_the_launchers(capfdbinary):
    outcome = run("import sys; print('one\\ntwo', end=''); print('bad', file=sys.stderr); sys.exit(3)")
    said = capfdbinary.readouterr()
    assert outcome == Outcome(3, lost=(0, 1, 2))
    assert (said.out, said.err) == (b"one\ntwo", b"bad\n")


def test_the_earliest_failure_counts_and_no_report_is_shown(capfdbinary):
    reports = f"loss{TOKEN} 0 1 node0 22.5\\nrest\\n{TOKEN} 2 7 node1 21.5\\n"
    outcome = run(f"import sys; sys.stderr.write('{reports}'); sys.exit(15)")
    assert outcome == Outcome(7, Failure("2", 7, "node1", 21.5))
    assert capfdbinary.readouterr().err == b"loss\nrest\n"


def test_a_launcher_that_hides_the_loss_of_ranks_does_not_succeed():
    reports = f"{TOKEN} 2 0 node1 1\\n{TOKEN} 0 0 node0 1\\n"
    assert run(f"import sys; sys.stderr.write('{reports}')") == Outcome(1, lost=(1,))
    assert run(f"import sys; sys.stderr.write('{reports}'); sys.exit(5)") == Outcome(5, lost=(1,))
    assert run("import os; os.kill(os.getpid(), 9)") == Outcome(137, lost=(0, 1, 2))
    everybodys = f"{reports}{TOKEN} 1 0 node1 1\\n"
    assert run(f"import sys; sys.stderr.write('{everybodys}')") == Outcome(0)
    assert run(f"import sys; sys.stderr.write('{everybodys}'); sys.exit(4)") == Outcome(4)


def test_a_line_that_the_launcher_leaves_half_way_is_ended(capfdbinary):
    run("import sys; sys.stderr.write('one\\ntwo')")
    assert capfdbinary.readouterr().err == b"one\ntwo\n"


def test_a_report_in_pieces_is_one(capfdbinary):
    source = (
        "import sys, time\nfor c in '{} 2 7 node1 21.5\\n': sys.stderr.write(c); sys.stderr.flush(); time.sleep(0.002)"
    )
    assert run(source.format(TOKEN)).failure == Failure("2", 7, "node1", 21.5)
    assert capfdbinary.readouterr().err == b""


def test_what_is_no_whole_line_is_shown_as_it_comes(tmp_path):
    # The launcher goes on when its output has been seen, so it ends only if that is before the line does.
    program = (
        "import os, sys, time; from mpitrain.launch.supervisor import run_job\n"
        "run_job([sys.executable, '-c', sys.argv[1], sys.argv[2]], dict(os.environ), 'word', 0)"
    )
    launcher = (
        "import os, sys, time; sys.stdout.write('...'); sys.stdout.flush()\n"
        "while not os.path.exists(sys.argv[1]): time.sleep(0.01)\n"
    )
    watcher = subprocess.Popen(
        [sys.executable, "-c", program, launcher, str(tmp_path / "seen")], stdout=subprocess.PIPE
    )
    assert watcher.stdout.read(3) == b"..."
    (tmp_path / "seen").touch()
    assert watcher.wait() == 0
    watcher.stdout.close()


@pytest.mark.parametrize("stubborn", [False, True])
def test_a_failure_ends_a_launcher_that_goes_on(monkeypatch, stubborn):
    monkeypatch.setattr(supervisor, "_GRACE_S", 0.2)
    monkeypatch.setattr(supervisor, "_ENDING_S", 0.2)
    first = "signal.signal(15, signal.SIG_IGN)" if stubborn else ""
    outcome = run(
        f"import signal, sys, time; {first}\n"
        f"print('{TOKEN} 1 9 node0 1.5', file=sys.stderr, flush=True); time.sleep(60)"
    )
    assert outcome == Outcome(9, Failure("1", 9, "node0", 1.5))


def test_output_that_somebody_keeps_open_is_given_up(monkeypatch, tmp_path):
    monkeypatch.setattr(supervisor, "_GRACE_S", 0.2)
    monkeypatch.setattr(supervisor, "_ENDING_S", 0.2)
    outcome = run(
        "import subprocess, sys, time, pathlib\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "pathlib.Path(sys.argv[1]).write_text(str(child.pid))\n"
        f"print('{TOKEN} 1 9 node0 1.5', file=sys.stderr)",
        tmp_path / "child",
    )
    assert outcome.status == 9
    os.kill(int((tmp_path / "child").read_text()), signal.SIGKILL)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_this_process_ends_the_launcher(number, tmp_path):
    before = signal.getsignal(number)
    ended = tmp_path / "ended"
    outcome = run(
        "import os, pathlib, signal, sys, time\n"
        "signal.signal(15, lambda *_: (pathlib.Path(sys.argv[1]).touch(), sys.exit(1)))\n"
        f"os.kill(os.getppid(), {int(number)}); time.sleep(60)",
        ended,
    )
    assert outcome == Outcome(128 + number)
    assert ended.exists()
    assert signal.getsignal(number) is before


@pytest.mark.skipif(sys.platform != "linux", reason="processes end with their parents on Linux only")
def test_the_launcher_ends_with_this_process(tmp_path):
    program = (
        "import os, sys; from mpitrain.launch.supervisor import run_job\n"
        "run_job([sys.executable, '-c', sys.argv[1], sys.argv[2]], dict(os.environ), 'word', 0)"
    )
    launcher = (
        "import os, pathlib, signal, sys, time\n"
        "signal.signal(15, lambda *_: (pathlib.Path(sys.argv[1]).touch(), sys.exit(1)))\n"
        "print('up', flush=True); time.sleep(60)"
    )
    ended = tmp_path / "ended"
    watcher = subprocess.Popen([sys.executable, "-c", program, launcher, str(ended)], stdout=subprocess.PIPE)
    assert watcher.stdout.read(3) == b"up\n"
    watcher.kill()
    watcher.wait()
    watcher.stdout.close()
    while not ended.exists():
        time.sleep(0.01)


def test_a_launcher_that_is_not_there(tmp_path):
    with pytest.raises(LaunchError, match="cannot be started, No such file"):
        run_job([str(tmp_path / "none")], {}, TOKEN, 1)
