"""Training jobs on the ranks of this run: the same steps as one process, the same parameters on all ranks."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import mpitrain.torch as hvd
from mpitrain.collectives import Communicator
from mpitrain.errors import CheckpointError
from mpitrain.training import (
    ShardedSampler,
    StopRequest,
    TrainingLoop,
    check_replicas,
    linear_scaling,
    load_checkpoint,
    save_checkpoint,
)

SCRIPTS = Path(__file__).parents[2] / "scripts"
NUM_STEPS = 50
# Divides by every number of ranks from 1 to 4.
BATCH_SIZE = 24


@pytest.fixture
def comm() -> Iterator[Communicator]:
    hvd.shutdown()
    hvd.init()
    yield hvd.communicator()
    hvd.shutdown()


@pytest.fixture
def digits(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script, as a module."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    monkeypatch.delenv("MPITRAIN_ALGORITHM", raising=False)
    return importlib.import_module("train_digits")


@pytest.fixture
def folder(comm: Communicator) -> Iterator[Path]:
    """One folder for all ranks; those of pytest are tidied up by all ranks at once, which do not bear it."""
    own = tempfile.TemporaryDirectory() if comm.rank == 0 else contextlib.nullcontext()
    with own as name:
        yield Path(comm.broadcast_obj(name))


def make_loop(
    digits: Any,
    rank: int,
    size: int,
    wrap: Callable[..., torch.optim.Optimizer],
    *,
    seed: int = 1,
    max_grad_norm: float | None = None,
) -> TrainingLoop:
    images, labels = digits.load_digits()
    torch.manual_seed(seed)
    # In float64, as training lets differences grow: those of float32 would be as large as an error in 50 steps.
    model = digits.DigitsNet().double()
    images = images.double()

    def batch_loss(indices: Sequence[int]) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(model(images[indices]), labels[indices])

    optimizer = wrap(
        torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9), named_parameters=model.named_parameters()
    )
    return TrainingLoop(
        model,
        optimizer,
        torch.optim.lr_scheduler.LambdaLR(optimizer, linear_scaling(2, warmup_steps=10)),
        ShardedSampler(1000, rank, size, seed=2, drop_last=True),
        batch_size=BATCH_SIZE,
        batch_loss=batch_loss,
        max_grad_norm=max_grad_norm,
    )


def alone(optimizer: torch.optim.Optimizer, named_parameters: Any) -> torch.optim.Optimizer:
    return optimizer


def mean_losses(loop: TrainingLoop) -> list[float]:
    losses: list[float] = hvd.allreduce(torch.tensor(loop.losses, dtype=torch.float64), name="losses").tolist()
    return losses


def test_ranks_with_parts_of_a_batch_follow_one_process_with_the_batch(comm, digits) -> None:
    expected = None
    if comm.rank == 0:
        reference = make_loop(digits, 0, 1, alone)
        list(reference.run(NUM_STEPS))
        expected = reference.losses
    expected = comm.broadcast_obj(expected)
    # Different parameters on every rank, until they are broadcast.
    loop = make_loop(digits, comm.rank, comm.size, hvd.DistributedOptimizer, seed=1 + comm.rank)
    hvd.broadcast_parameters(loop.model.state_dict(), root_rank=0)
    list(loop.run(NUM_STEPS))
    assert mean_losses(loop) == pytest.approx(expected, abs=1e-9)
    assert expected[-1] < expected[0] / 4
    check_replicas(loop.model.state_dict(), comm)


def test_clipped_steps_leave_the_same_parameters_on_all_ranks(comm, digits) -> None:
    loop = make_loop(digits, comm.rank, comm.size, hvd.DistributedOptimizer, max_grad_norm=0.01)
    before = [param.detach().clone() for param in loop.model.parameters()]
    list(loop.run(3))
    check_replicas(loop.model.state_dict(), comm)
    moved = torch.cat([(param - old).flatten() for param, old in zip(loop.model.parameters(), before, strict=True)])
    # Three steps of at most 0.01 * 0.014 each, and the momentum of those before.
    assert 0 < moved.norm().item() < 0.01 * 0.014 * 6


def test_a_checkpoint_brings_all_ranks_to_the_same_place(comm, digits, folder) -> None:
    loop = make_loop(digits, comm.rank, comm.size, hvd.DistributedOptimizer)
    list(loop.run(4))
    save_checkpoint(folder / "digits.ckpt", loop, comm)
    other = make_loop(digits, comm.rank, comm.size, hvd.DistributedOptimizer, seed=5 + comm.rank)
    load_checkpoint(folder / "digits.ckpt" if comm.rank == 0 else "nowhere", other, comm)
    list(loop.run(7))
    list(other.run(7))
    # Not to the bit: the first step of an optimizer has other buckets, in which sums may have another order.
    assert other.losses == pytest.approx(loop.losses[4:], abs=1e-6)
    check_replicas(other.model.state_dict(), comm)


def test_a_corrupt_checkpoint_is_an_error_on_every_rank(comm, digits, folder) -> None:
    path = folder / "digits.ckpt"
    loop = make_loop(digits, comm.rank, comm.size, hvd.DistributedOptimizer)
    save_checkpoint(path, loop, comm)
    content = bytearray(path.read_bytes())
    comm.barrier()
    if comm.rank == 0:
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    list(loop.run(1))
    digest = check_replicas(loop.model.state_dict(), comm)
    with pytest.raises(CheckpointError, match=r"digits\.ckpt: is corrupt"):
        load_checkpoint(path, loop, comm)
    # Nothing was overwritten, and the job could go on.
    assert (comm.rank != 0) or path.read_bytes() == content
    assert check_replicas(loop.model.state_dict(), comm) == digest
    list(loop.run(2))


def test_a_checkpoint_that_cannot_be_written_is_an_error_on_every_rank(comm, digits, folder) -> None:
    loop = make_loop(digits, comm.rank, comm.size, hvd.DistributedOptimizer)
    with pytest.raises(CheckpointError, match="cannot be written"):
        save_checkpoint(folder / "none" / "digits.ckpt", loop, comm)


def test_replicas_that_differ_are_an_error_on_every_rank(comm, digits) -> None:
    if comm.size == 1:
        pytest.skip("one rank cannot differ from others")
    model = digits.DigitsNet()
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    check_replicas(model.state_dict(), comm)
    if comm.rank == comm.size - 1:
        with torch.no_grad():
            next(iter(model.parameters()))[0] *= 1 + 1e-6
    with pytest.raises(RuntimeError, match=rf"ranks \[{comm.size - 1}\] differ from rank 0.*0\.weight"):
        check_replicas(model.state_dict(), comm)


def test_a_signal_to_one_rank_stops_all_after_the_same_step(comm) -> None:
    answers = []
    with StopRequest(comm) as stop:
        for step in range(6):
            if step == 2 and comm.rank == comm.size - 1:
                os.kill(os.getpid(), signal.SIGTERM)
            answers.append(stop.agreed_signal())
    late = comm.size > 1
    assert answers == [0] * (2 + late) + [signal.SIGTERM] * (4 - late)


@pytest.mark.parametrize("algorithm", ["ring", "double_tree", "native"])
def test_the_script_trains_with_every_algorithm(comm, digits, folder, monkeypatch, algorithm) -> None:
    hvd.shutdown()
    path = folder / "results.json"
    # Set, so that it is restored after the script has set it.
    monkeypatch.setenv("MPITRAIN_ALGORITHM", "auto")
    plans = []
    plan = Communicator.plan_allreduce_
    monkeypatch.setattr(Communicator, "plan_allreduce_", lambda *a, **k: plans.append(made := plan(*a, **k)) or made)
    assert digits.main(["--epochs", "1", "--batch-size", "120", "--algorithm", algorithm, "--json", str(path)]) == 0
    hvd.init()
    results = hvd.communicator().broadcast_obj(json.loads(path.read_text()) if hvd.rank() == 0 else None)
    assert results["ranks"] == hvd.size()
    assert results["last_step"] == len(results["losses"]) == 11
    assert results["losses"][-1] < results["losses"][0]
    # Gradients went by this algorithm, and by no other.
    assert [made.description.endswith(f"by {algorithm}") for made in plans] == [True] * len(plans)
    assert bool(plans) == (hvd.size() > 1)


def test_the_script_refuses_an_unknown_algorithm_on_every_rank(comm, digits, capfd, monkeypatch) -> None:
    rank = comm.rank
    hvd.shutdown()
    monkeypatch.setenv("MPITRAIN_ALGORITHM", "auto")
    assert digits.main(["--algorithm", "bogus"]) == 2
    said = capfd.readouterr()
    assert ("use one of auto, native" in said.err) == (rank == 0)
    assert not hvd.is_initialized()
