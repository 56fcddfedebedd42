from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

import mpitrain.launch.agent

RANK = {"OMPI_COMM_WORLD_RANK": "3", "PATH": os.environ["PATH"]}


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-ISs", mpitrain.launch.agent.__file__, *arguments]


def run(*arguments: str, environ: dict[str, str] | None = None) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(command(*arguments), env=environ or RANK, capture_output=True, check=False)


def program(source: str) -> list[str]:
    return ["--", sys.executable, "-c", source]


def test_lines_of_both_outputs_begin_with_the_rank():
    done = run("--tag", *program("import sys; print('one\\n\\ntwo', end=''); print('bad', file=sys.stderr)"))
    assert done.stdout == b"[3] one\n[3] \n[3] two\n"
    assert done.stderr == b"[3] bad\n"


def test_a_progress_bar_is_shown_as_it_moves():
    done = run("--tag", *program("print('1/2\\r2/2\\r\\nend')"))
    assert done.stdout == b"[3] 1/2\r[3] 2/2\r\n[3] end\n"


def test_output_without_an_end_of_line_does_not_pile_up():
    done = run("--tag", *program("print('x' * 300_000)"))
    assert done.stdout.replace(b"[3] ", b"").replace(b"\n", b"") == b"x" * 300_000
    assert done.stdout.count(b"\n") > 3


def test_without_tags_the_output_is_the_programs():
    assert run(*program("print('one')")).stdout == b"one\n"


@pytest.mark.parametrize("name", ["OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK", "SLURM_PROCID"])
def test_the_rank_is_known_under_every_launcher(name):
    assert run("--tag", *program("print()"), environ={name: "5"}).stdout == b"[5] \n"


def test_arguments_arrive_as_they_are():
    words = ["", ";", "$(touch evil)", "a b", "\n", "*", "--tag", "--", "--token", "\\", "a:b", "é"]
    # As the launcher's command has them.
    escaped = ["\\:", "\\\\:"]
    done = run(*program("import sys; print(ascii(sys.argv[1:]))"), *words, *escaped)
    assert done.stdout.decode() == ascii([*words, ":", "\\:"]) + "\n"


@pytest.mark.parametrize(
    ("source", "status"),
    [("import sys; sys.exit(7)", 7), ("import os; os.kill(os.getpid(), 9)", 137), ("raise ValueError", 1)],
)
def test_a_failure_is_reported_and_becomes_the_exit_status(source, status):
    done = run("--tag", "--token", "word", *program(source))
    assert done.returncode == status
    *report, time_s = done.stderr.splitlines()[-1].decode().split()
    assert report == ["word", "3", str(status), socket.gethostname()]
    assert 0 <= time.time() - float(time_s) < 30


def test_success_is_reported_as_well():
    done = run("--token", "word", *program("pass"))
    assert done.returncode == 0
    assert done.stderr.decode().startswith(f"word 3 0 {socket.gethostname()} ")


def test_a_program_that_cannot_be_run(tmp_path):
    missing = run("--token", "word", "--", str(tmp_path / "none"))
    assert missing.returncode == 127
    reason, report = missing.stderr.decode().splitlines()
    assert f"cannot run '{tmp_path}/none' on {socket.gethostname()}: No such file" in reason
    assert report.startswith("word 3 127 ")
    (tmp_path / "text").write_text("text")
    assert run("--", str(tmp_path / "text")).returncode == 126


def wait_for(path) -> int:
    while not (path.exists() and path.read_text()):
        time.sleep(0.01)
    return int(path.read_text())


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


WAITING = (
    "import os, pathlib, signal, sys, time; {}; pathlib.Path(sys.argv[1]).write_text(str(os.getpid())); time.sleep(60)"
)


def test_signals_go_on_to_the_program_and_are_not_reported(tmp_path):
    source = WAITING.format("signal.signal(15, lambda *_: sys.exit(5))")
    agent = subprocess.Popen(
        command("--token", "word", *program(source), str(tmp_path / "pid")), env=RANK, stderr=subprocess.PIPE
    )
    wait_for(tmp_path / "pid")
    agent.terminate()
    said = agent.communicate()[1]
    assert (agent.returncode, said) == (5, b"")


def test_a_failure_is_reported_though_a_signal_comes_before_the_agent_has_noticed_it(tmp_path):
    # The agent cannot go on before it is told to end as well.
    source = "import os, pathlib, signal, sys; {}; pathlib.Path(sys.argv[1]).write_text(str(os.getpid())); os._exit(7)"
    agent = subprocess.Popen(
        command(
            "--token", "word", *program(source.format("os.kill(os.getppid(), signal.SIGSTOP)")), str(tmp_path / "pid")
        ),
        env=RANK,
        stderr=subprocess.PIPE,
    )
    process = wait_for(tmp_path / "pid")
    while is_running(process):
        time.sleep(0.01)
    agent.terminate()
    agent.send_signal(signal.SIGCONT)
    said = agent.communicate()[1].decode()
    assert said.startswith(f"word 3 7 {socket.gethostname()} ")
    assert agent.returncode == 7


@pytest.mark.skipif(sys.platform != "linux", reason="processes end with their parents on Linux only")
def test_the_program_ends_with_the_agent(tmp_path):
    agent = subprocess.Popen(command("--tag", *program(WAITING.format("pass")), str(tmp_path / "pid")), env=RANK)
    process = wait_for(tmp_path / "pid")
    agent.send_signal(signal.SIGKILL)
    agent.wait()
    while is_running(process):
        time.sleep(0.01)


def test_what_the_program_leaves_running_does_not_hold_the_agent():
    source = (
        "import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']).pid)"
    )
    done = run("--tag", *program(source))
    assert done.returncode == 0
    os.kill(int(done.stdout.split()[1]), signal.SIGKILL)
