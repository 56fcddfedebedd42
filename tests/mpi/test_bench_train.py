"""Training steps of synthetic models are measured side by side, and end with the same parameters."""

from __future__ import annotations

import pytest

from mpitrain.bench import training
from mpitrain.bench.results import read_results
from mpitrain.bench.stopwatch import Effort
from mpitrain.bench.training import TrainRequest
from mpitrain.cli.bench_job import Output, bench_training
from mpitrain.cli.job import JobError
from mpitrain.collectives import Communicator
from mpitrain.config import Settings

SETTINGS = Settings(wait="sleep")
HASTY = Effort((1, 2), 10.0)


def request_for(model: str, *rivals: str) -> TrainRequest:
    return TrainRequest(models=(model,), rivals=rivals, batch=1, threads=1, effort=HASTY)


def test_steps_are_measured_and_stored(tmp_path_factory, capsys):
    comm = Communicator.from_mpi(settings=SETTINGS)
    path = comm.broadcast_obj(tmp_path_factory.mktemp("train") / "results.json")
    comm.free()
    bench_training(request_for("resnet", "ddp"), Output(path, None), SETTINGS)
    run = read_results(path)
    assert [(row.model, row.side) for row in run.rows] == [("resnet", side) for side in ("alone", "mpitrain", "DDP")]
    for row in run.rows:
        assert row.iterations == 2
        assert row.num_parameters > 2_000_000
        assert run.samples_per_s(row) > 0
        assert row.cpu > 0
        assert (row.exposed_s is not None) == (row.side == "mpitrain")
    if run.setup.shape.size > 1:
        # A step of ours cannot hide or expose nothing at all: gradients were exchanged.
        assert all(row.exposed_s + row.hidden_s > 0 for row in run.rows if row.side == "mpitrain")
    printed = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("resnet")]
    if printed:  # on rank 0
        assert [line[:3] for line in printed] == [[row.model, row.side, "1"] for row in run.rows]
        assert all(len(line) == 14 for line in printed)


@pytest.mark.mpi(min_size=2)
def test_ranks_with_different_parameters_are_an_error_on_all(monkeypatch):
    true_digest = training._Side.digest
    monkeypatch.setattr(training._Side, "digest", lambda side: true_digest(side) + training.hvd.rank())
    with pytest.raises(JobError, match="parameters: differ among the ranks"):
        bench_training(request_for("resnet"), Output(None, None), SETTINGS)
    training.hvd.shutdown()


def test_unknown_models_and_rivals_are_refused():
    with pytest.raises(ValueError, match="model: unknown, got 'bert'; use one of mlp, gpt, resnet"):
        request_for("bert")
    with pytest.raises(ValueError, match="compare: unknown, got 'fsdp'; use ddp"):
        request_for("mlp", "fsdp")
