"""The scripts of `examples/horovod`, as users start them: two ranks, a few steps."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from tests.support.jobs import needs_mpirun, run_python

pytest.importorskip("torch")
pytest.importorskip("sklearn")

EXAMPLES = Path(__file__).parents[3] / "examples" / "horovod"

pytestmark = needs_mpirun


def run(script: str, *arguments: object, folder: Path) -> str:
    """Run a script that must end well on two ranks; return what they have printed."""
    done = run_python("-m", "mpitrain.horovod", EXAMPLES / script, *arguments, size=2, folder=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def numbers(pattern: str, output: str) -> list[float]:
    return [float(text) for text in re.findall(pattern, output)]


def test_they_know_nothing_but_horovod() -> None:
    for path in EXAMPLES.glob("*.py"):
        text = path.read_text()
        assert "mpitrain" not in text
        assert "import horovod.torch as hvd" in text


def test_digits_are_learned_and_every_rank_prints_once(tmp_path: Path) -> None:
    output = run("digits.py", "--epochs", 3, "--fp16-allreduce", "--gradient-predivide-factor", 2, folder=tmp_path)
    assert len(numbers(r"epoch \d batch 0/23 loss ([\d.]+)", output)) == 3
    accuracies = numbers(r"accuracy ([\d.]+)", output)
    assert len(accuracies) == 3
    assert accuracies[-1] > 0.7


def test_the_benchmark_reports_rates_of_one_rank_and_of_all(tmp_path: Path) -> None:
    small = ("--width", 4, "--image-size", 16, "--batch-size", 4)
    few = ("--num-warmup-batches", 1, "--num-batches-per-iter", 2, "--num-iters", 3)
    output = run("synthetic_benchmark.py", *small, *few, folder=tmp_path)
    assert "Number of ranks: 2" in output
    assert len(numbers(r"Iter #\d: ([\d.]+) img/sec per rank", output)) == 3
    (each,) = numbers(r"Img/sec per rank: ([\d.]+)", output)
    (total,) = numbers(r"Total img/sec on 2 rank\(s\): ([\d.]+)", output)
    assert total == pytest.approx(2 * each, abs=0.2)


def test_training_resumes_from_the_checkpoint_of_the_last_epoch(tmp_path: Path) -> None:
    def losses(output: str) -> list[float]:
        return numbers(r"validation loss ([\d.]+)", output)

    whole = run("warmup_resume.py", "--epochs", 3, "--checkpoint-format", "whole-{epoch}.pt", folder=tmp_path)
    # Doubled by two batches per step, it grows from the rate of one rank to that of two, and is a tenth in the end.
    rates = numbers(r"lr ([\d.]+)", whole)
    assert 0.02 < rates[0] < 0.03 < rates[1] < 0.04
    assert rates[2] == 0.004
    assert numbers(r"validation .* accuracy ([\d.]+)", whole)[-1] > 0.8
    shutil.copy(tmp_path / "whole-2.pt", tmp_path / "part-2.pt")
    resumed = run("warmup_resume.py", "--epochs", 3, "--checkpoint-format", "part-{epoch}.pt", folder=tmp_path)
    assert "epoch 3 validation" in resumed
    assert losses(resumed) == pytest.approx(losses(whole)[2:], abs=2e-4)


def test_an_elastic_job_without_failures(tmp_path: Path) -> None:
    output = run("elastic_digits.py", "--epochs", 2, folder=tmp_path)
    # 1797 samples are 899 of each rank, in batches of 32.
    assert len(numbers(r"epoch \d loss ([\d.]+) after 29 batches", output)) == 2
    assert numbers(r"^accuracy ([\d.]+)$", output.splitlines()[-1])[0] > 0.8
