"""The training scripts as users start them: each run is a job of its own."""

from __future__ import annotations

import importlib
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.jobs import needs_mpirun, run_python

SCRIPTS = Path(__file__).parents[3] / "scripts"


def run(script: str, size: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a script on so many ranks; on one without mpirun."""
    return run_python(SCRIPTS / script, *arguments, size=size)


def results_of(folder: Path, script: str, size: int, *arguments: object) -> dict[str, Any]:
    """Run a script that must end well; return what it wrote."""
    path = folder / "results.json"
    done = run(script, size, *arguments, "--json", path)
    assert done.returncode == 0, done.stdout + done.stderr
    results: dict[str, Any] = json.loads(path.read_text())
    path.unlink()
    assert results["ranks"] == size
    assert len(results["losses"]) == results["last_step"] - results["first_step"]
    return results


@needs_mpirun
def test_digits_go_on_at_other_numbers_of_ranks_as_one_rank_would(tmp_path) -> None:
    # Batches of which 9 make an epoch; from more ranks to fewer, and within an epoch, is for the next test.
    common = ("--batch-size", 150, "--seed", 3)
    whole = results_of(tmp_path, "train_digits.py", 1, "--epochs", 3, *common)
    saving = (*common, "--checkpoint", tmp_path / "digits.ckpt")
    parts = [
        results_of(tmp_path, "train_digits.py", 1, "--epochs", 1, *saving),
        results_of(tmp_path, "train_digits.py", 2, "--epochs", 3, *saving, "--resume"),
    ]
    assert [(part["first_step"], part["last_step"]) for part in parts] == [(0, 9), (9, 27)]
    losses = [loss for part in parts for loss in part["losses"]]
    assert losses == pytest.approx(whole["losses"], abs=1e-4)
    assert parts[-1]["test_loss"] == pytest.approx(whole["test_loss"], abs=1e-4)
    assert whole["losses"][-1] < 0.5 < whole["losses"][0]
    assert whole["test_accuracy"] > 0.85
    assert whole["communication_share"] == 0.0
    assert 0.0 < parts[1]["communication_share"] < 1.0


@needs_mpirun
def test_gpt_stops_within_an_epoch_and_goes_on_at_another_number_of_ranks(tmp_path) -> None:
    small = ("--context", 16, "--layers", 1, "--width", 32, "--batch-size", 8, "--sample", 5)
    whole = results_of(tmp_path, "train_gpt.py", 1, *small, "--steps", 20)
    saving = (*small, "--checkpoint", tmp_path / "gpt.ckpt")
    first = results_of(tmp_path, "train_gpt.py", 2, *saving, "--steps", 7)
    second = results_of(tmp_path, "train_gpt.py", 1, *saving, "--steps", 20, "--resume")
    assert (second["first_step"], second["last_step"]) == (7, 20)
    assert first["losses"] + second["losses"] == pytest.approx(whole["losses"], abs=1e-4)
    assert second["test_loss"] == pytest.approx(whole["test_loss"], abs=1e-4)


def test_gpt_looks_at_nothing_that_follows(monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    gpt = importlib.import_module("train_gpt")
    torch.manual_seed(1)
    model = gpt.GPT(vocabulary=9, context=12, num_layers=2, width=32, num_heads=2)
    tokens = torch.randint(9, (3, 12))
    changed = tokens.clone()
    changed[:, 7] = (changed[:, 7] + 1) % 9
    difference = (model(tokens) - model(changed)).abs().amax(dim=(0, 2))
    assert difference[:7].max() < 1e-6
    assert difference[7:].min() > 1e-4


def test_gpt_reads_the_text_that_it_writes(monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    gpt = importlib.import_module("train_gpt")
    assert gpt.decode(gpt.encode("def f(x):\n    return x")) == "def f(x):\n    return x"
    assert gpt.decode(gpt.encode("é\t")) == "??"
    text = gpt.read_text()
    assert len(text) > 100_000
    assert text == gpt.read_text()


@pytest.mark.parametrize("size", [1, pytest.param(3, marks=needs_mpirun)])
def test_an_unknown_algorithm_is_one_message_that_lists_the_known_ones(size) -> None:
    done = run("train_digits.py", size, "--algorithm", "bogus")
    assert done.returncode != 0
    said = done.stdout + done.stderr
    assert said.count("unknown algorithm of allreduce, got 'bogus'") == 1
    for name in ("ring", "double_tree", "native"):
        assert name in said
    assert "Traceback" not in said


@needs_mpirun
def test_a_damaged_checkpoint_is_one_message_that_names_the_file(tmp_path) -> None:
    path = tmp_path / "damaged.ckpt"
    path.write_bytes(b"mpitrain checkpoint\n" + bytes(1000))
    done = run("train_digits.py", 2, "--checkpoint", path, "--resume")
    assert done.returncode != 0
    said = done.stdout + done.stderr
    assert said.count(str(path)) == 1
    assert "Traceback" not in said
    assert path.read_bytes() == b"mpitrain checkpoint\n" + bytes(1000)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--resume"], "add --checkpoint"),
        (["--batch-size", "5000"], "at most the 1437 samples"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
    ],
)
def test_options_that_make_no_sense_are_one_message(arguments, words) -> None:
    done = run("train_digits.py", 1, *arguments)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert words in done.stderr
