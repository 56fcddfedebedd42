"""A training job from the first step to the report, for any model and data."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from typing import Any

import torch

import mpitrain.torch as hvd
from job.options import Parser, UsageError
from job.progress import Progress, speed
from mpitrain import Communicator, Settings
from mpitrain.errors import CheckpointError
from mpitrain.training import (
    Meter,
    ShardedSampler,
    StopRequest,
    TrainingLoop,
    check_replicas,
    linear_scaling,
    load_checkpoint,
    save_checkpoint,
)

__all__ = ["Totals", "Workload", "run_job"]


@dataclasses.dataclass(frozen=True)
class Totals:
    """Sums over some test samples, from which the ranks make exact means over all of them."""

    count: int
    loss: float
    correct: int


@dataclasses.dataclass(frozen=True)
class Workload:
    """What one training script has and another has not.

    Attributes:
        model: The same parameters on every rank are not required.
        make_optimizer: Called with the parameters and the learning rate.
        num_samples: For training.
        batch_loss: Returns the mean loss of the training samples with these indices.
        num_test_samples: For evaluation.
        evaluate: Returns sums over the test samples with these indices.
        num_steps: In all.
        report_steps: From one evaluation to the next, after each of which a checkpoint is saved.
        max_grad_norm: See `TrainingLoop`.
        epilogue: Returns what rank 0 prints at the end.
    """

    model: torch.nn.Module
    make_optimizer: Callable[[Any, float], torch.optim.Optimizer]
    num_samples: int
    batch_loss: Callable[[Sequence[int]], torch.Tensor]
    num_test_samples: int
    evaluate: Callable[[Sequence[int]], Totals]
    num_steps: int
    report_steps: int
    max_grad_norm: float | None = None
    epilogue: Callable[[], str] | None = None


def run_job(
    parser: Parser, make_workload: Callable[[Namespace], Workload], arguments: Sequence[str] | None = None
) -> int:
    """Train as the command line says; every rank returns the exit status."""
    try:
        options = parser.parse_args(arguments)
        settings = Settings.from_environ()
        hvd.init(settings=settings.replace(algorithm=options.algorithm or settings.algorithm))
        return _Job(options, make_workload).run()
    except (UsageError, CheckpointError) as error:
        # All ranks have the same one, so one of them tells it; MPI lets no rank leave before that one.
        hvd.init()
        if hvd.rank() == 0:
            print(f"{parser.prog}: {error}", file=sys.stderr, flush=True)
        return 2
    finally:
        hvd.shutdown()


class _Job:
    """One run of a workload on all ranks."""

    def __init__(self, options: Namespace, make_workload: Callable[[Namespace], Workload]) -> None:
        self.options = options
        self.comm = hvd.communicator()
        _check_options(options, self.comm)
        if "OMP_NUM_THREADS" not in os.environ:
            # Ranks that each use all cores of the node only wait for one another.
            torch.set_num_threads(max(1, int(self.comm.topology.cores_per_rank)))
        torch.manual_seed(options.seed)
        self.workload = make_workload(options)
        self.loop = _make_loop(options, self.workload)
        self.first_step = 0
        self.metrics: dict[str, Any] = {}

    def run(self) -> int:
        loop, options = self.loop, self.options
        if options.resume:
            load_checkpoint(options.checkpoint, loop, self.comm)
        self.first_step = loop.step
        hvd.broadcast_parameters(loop.model.state_dict(), root_rank=0)
        hvd.broadcast_optimizer_state(loop.optimizer, root_rank=0)
        signal_number = self._train()
        digest = check_replicas(loop.model.state_dict(), self.comm)
        self._finish(digest)
        return 128 + signal_number if signal_number else 0

    def _train(self) -> int:
        """Take all steps; return the number of the signal that ended them early, or 0."""
        loop, num_steps = self.loop, self.workload.num_steps
        with Progress(num_steps, is_shown=hvd.rank() == 0) as progress, StopRequest(self.comm) as stop:
            progress.line(self._headline())
            for step in loop.run(num_steps):
                meter = loop.meter
                progress.update(step, loop.losses[-1], meter.samples_per_s, meter.communication_share)
                signal_number = stop.agreed_signal()
                if step % self.workload.report_steps == 0 or step == num_steps:
                    progress.line(self._report())
                elif signal_number:
                    self._save()
                if signal_number:
                    progress.line(f"stopped by signal {signal_number} after step {step}")
                    return signal_number
            if not loop.losses:
                progress.line(self._report())
        return 0

    def _headline(self) -> str:
        parameters = sum(param.numel() for param in self.loop.model.parameters())
        origin = f", from step {self.first_step} of {self.options.checkpoint}" if self.first_step else ""
        return (
            f"{hvd.size()} {'rank' if hvd.size() == 1 else 'ranks'}, {parameters} parameters, "
            f"{self.workload.num_samples} samples, batches of {self.options.batch_size}{origin}"
        )

    def _report(self) -> str:
        """Evaluate, save a checkpoint; return what rank 0 says about it."""
        self._save()
        losses = hvd.allreduce(torch.tensor(self.loop.losses, dtype=torch.float64), name="losses").tolist()
        pace, scores = self._speed(), self._evaluate()
        self.metrics = {"losses": losses, **pace, **scores}
        recent = losses[-self.workload.report_steps :]
        training = f"training loss {sum(recent) / len(recent):.4f}, " if recent else ""
        return (
            f"step {self.loop.step}: {training}test loss {scores['test_loss']:.4f}, "
            f"test accuracy {scores['test_accuracy']:.2%}, "
            f"{speed(pace['samples_per_s'], pace['communication_share'])}"
        )

    def _save(self) -> None:
        if self.options.checkpoint is not None:
            save_checkpoint(self.options.checkpoint, self.loop, self.comm)

    def _speed(self) -> dict[str, float]:
        """Return what was measured on all ranks; the slowest one decides how long training took."""
        meter = self.loop.meter
        times = hvd.allgather(
            torch.tensor([[meter.elapsed_s, meter.communication_s]], dtype=torch.float64), name="times"
        )
        elapsed_s, communication_s = times.unbind(dim=1)
        slowest_s = elapsed_s.max().item()
        return {
            "training_s": slowest_s,
            "samples_per_s": meter.samples / slowest_s if slowest_s else 0.0,
            "communication_share": (communication_s.sum() / elapsed_s.sum()).item() if slowest_s else 0.0,
        }

    def _evaluate(self) -> dict[str, float]:
        """Test each sample on one rank; add up over ranks, so that uneven parts count as what they are."""
        model = self.loop.model
        model.eval()
        with torch.no_grad():
            part = self.workload.evaluate(range(hvd.rank(), self.workload.num_test_samples, hvd.size()))
        model.train()
        sums = torch.tensor([part.count, part.loss, part.correct], dtype=torch.float64)
        count, loss, correct = hvd.allreduce(sums, op=hvd.Sum, name="test").tolist()
        return {"test_loss": loss / count, "test_accuracy": correct / count}

    def _finish(self, digest: str) -> None:
        if hvd.rank() != 0:
            return
        print(f"parameters are identical on all ranks, SHA-256 {digest[:16]}", flush=True)
        if self.workload.epilogue is not None:
            with torch.no_grad():
                print(self.workload.epilogue(), flush=True)
        if self.options.json is not None:
            facts = {
                "ranks": hvd.size(),
                "batch_size": self.options.batch_size,
                "first_step": self.first_step,
                "last_step": self.loop.step,
                "parameters_sha256": digest,
                **self.metrics,
            }
            self.options.json.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def _check_options(options: Namespace, comm: Communicator) -> None:
    known = comm.known_algorithms("allreduce")
    if comm.settings.algorithm not in known:
        raise UsageError(
            f"--algorithm: unknown algorithm of allreduce, got {comm.settings.algorithm!r}; "
            f"use one of {', '.join(known)}"
        )
    if options.resume and options.checkpoint is None:
        raise UsageError("--resume: needs a file to go on from; add --checkpoint PATH")


def _make_loop(options: Namespace, workload: Workload) -> TrainingLoop:
    model = workload.model
    try:
        optimizer = hvd.DistributedOptimizer(
            workload.make_optimizer(model.parameters(), options.lr), named_parameters=model.named_parameters()
        )
        scaling = linear_scaling(options.batch_size / options.lr_batch_size, options.warmup_steps)
        return TrainingLoop(
            model,
            optimizer,
            torch.optim.lr_scheduler.LambdaLR(optimizer, scaling),
            ShardedSampler(workload.num_samples, hvd.rank(), hvd.size(), seed=options.seed, drop_last=True),
            batch_size=options.batch_size,
            batch_loss=workload.batch_loss,
            max_grad_norm=workload.max_grad_norm,
            meter=Meter(lambda: hvd.communication_counters().exposed_s),
        )
    except ValueError as error:
        raise UsageError(str(error)) from None
