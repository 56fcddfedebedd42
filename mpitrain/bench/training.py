"""Times training steps: each rank for itself, with `DistributedOptimizer`, and with torch's DistributedDataParallel."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import gc
import mmap
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

import mpitrain.torch as hvd
from mpitrain.bench.models import MODELS, TrainingTask
from mpitrain.bench.results import TrainRow
from mpitrain.bench.rivals import process_group
from mpitrain.bench.stopwatch import Effort, interleaved_times
from mpitrain.collectives import Communicator

__all__ = ["TRAIN_RIVALS", "TrainRequest", "measure_training"]

TRAIN_RIVALS = ("ddp",)
"""What `DistributedOptimizer` can be compared with."""

_PAUSE_S = 1e-3
_LEARNING_RATE = 0.01
# Two ways to add up the same gradients differ by rounding, and steps add up their differences.
_TOLERANCE = 1e-3


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainRequest:
    """What to measure.

    Attributes:
        models: Names of models.
        rivals: Of `TRAIN_RIVALS`.
        batch: Samples per rank and step; None for what is usual for each model.
        threads: Of each rank; None for its share of the cores.
        effort: For each model.
    """

    models: tuple[str, ...]
    rivals: tuple[str, ...]
    batch: int | None
    threads: int | None
    effort: Effort

    def __post_init__(self) -> None:
        """Check what can be checked without ranks.

        Raises:
            ValueError: Something is unknown.
        """
        for name in self.models:
            if name not in MODELS:
                raise ValueError(f"model: unknown, got {name!r}; use one of {', '.join(MODELS)}")
        for name in self.rivals:
            if name not in TRAIN_RIVALS:
                raise ValueError(f"compare: unknown, got {name!r}; use {', '.join(TRAIN_RIVALS)}")


class _Side:
    """One way to make training steps, and what its steps took besides time."""

    def __init__(
        self, name: str, task: TrainingTask, batch: int, wrap: Callable[[torch.nn.Module], torch.nn.Module]
    ) -> None:
        self.name = name
        before_nbytes = _resident_nbytes()
        torch.manual_seed(0)
        self.model = wrap(task.make_model())
        # No momentum: without averaging, ranks would drift apart and meet slower arithmetic on the way.
        self.optimizer: torch.optim.Optimizer = torch.optim.SGD(self.model.parameters(), lr=_LEARNING_RATE)
        if name == "mpitrain":
            self.optimizer = hvd.DistributedOptimizer(self.optimizer, named_parameters=self.model.named_parameters())
        self._inputs, self._targets = task.make_batch(batch, torch.Generator().manual_seed(hvd.rank()))
        self._loss = task.loss
        # Of each step: cores that were busy, seconds exposed, seconds hidden.
        self._spent: list[tuple[float, float, float]] = []
        for _ in range(3):  # the first steps make gradients and buckets
            self._step()
        # After more steps, what differs by rounding may differ by much.
        self.first_digest = self.digest()
        self.memory_nbytes = max(0, _resident_nbytes() - before_nbytes)

    def step(self) -> None:
        """Make one step."""
        before = hvd.communication_counters()
        began_s, cpu_s = time.perf_counter(), time.process_time()
        self._step()
        cpu = (time.process_time() - cpu_s) / (time.perf_counter() - began_s)
        counters = hvd.communication_counters() - before
        self._spent.append((cpu, counters.exposed_s, counters.hidden_s))

    def _step(self) -> None:
        self.optimizer.zero_grad()
        self._loss(self.model(self._inputs), self._targets).backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()

    def typical(self, count: int) -> list[float]:
        """Return the medians of the last so many steps."""
        return [statistics.median(values) for values in zip(*self._spent[-count:], strict=True)]

    def digest(self) -> torch.Tensor:
        """Return a few sums of the parameters."""
        return torch.stack([param.detach().double().sum() for param in self.model.parameters()])


def measure_training(request: TrainRequest) -> Iterator[list[TrainRow]]:
    """Measure all sides of one model after another; yield their rows. Every rank must exhaust it, after `hvd.init`.

    Raises:
        RuntimeError: The ranks do not end with the same parameters, or not with those of a rival; on every rank.
        UnavailableError: A rival cannot run here; on every rank.
    """
    comm = hvd.communicator()
    torch.set_num_threads(request.threads or max(1, int(comm.topology.cores_per_rank)))
    with process_group(comm) if "ddp" in request.rivals else contextlib.nullcontext():
        for name in request.models:
            task = MODELS[name]
            yield _measure_model(comm, name, task, request.batch or task.batch, request)


def _measure_model(
    comm: Communicator, name: str, task: TrainingTask, batch: int, request: TrainRequest
) -> list[TrainRow]:
    # What the first steps of a kind take for good, such as the tables of a library, is no side's.
    _Side("alone", task, batch, _as_it_is)
    gc.collect()
    sides = [_Side("alone", task, batch, _as_it_is), _Side("mpitrain", task, batch, _as_it_is)]
    if "ddp" in request.rivals:
        sides.append(_Side("DDP", task, batch, torch.nn.parallel.DistributedDataParallel))
    effort = request.effort
    one_rank_s = _time_one_rank(comm, sides[0], effort)
    times = interleaved_times(comm, {side.name: side.step for side in sides}, effort)
    _check_parameters(comm, sides[1:])
    rows = []
    for side in sides:
        samples = times.samples_s[side.name]
        cpu, exposed_s, hidden_s = _over_ranks(comm, side.typical(len(samples)), "average")
        (memory_nbytes,) = _over_ranks(comm, [side.memory_nbytes], "max")
        is_counted = side.name == "mpitrain"
        rows.append(
            TrainRow(
                model=name,
                num_parameters=sum(param.numel() for param in side.model.parameters()),
                side=side.name,
                batch=batch,
                iterations=len(samples),
                median_s=times.medians_s[side.name],
                p5_s=times.percentile_s(side.name, 5),
                p95_s=times.percentile_s(side.name, 95),
                one_rank_s=one_rank_s,
                exposed_s=exposed_s if is_counted else None,
                hidden_s=hidden_s if is_counted else None,
                cpu=cpu,
                memory_nbytes=int(memory_nbytes),
            )
        )
    return rows


def _as_it_is(model: torch.nn.Module) -> torch.nn.Module:
    return model


def _time_one_rank(comm: Communicator, side: _Side, effort: Effort) -> float:
    """Return the median step of rank 0 while all others sleep; the same on every rank."""
    samples_s: list[float] = []
    comm.barrier()
    if comm.rank == 0:
        end_s = time.perf_counter() + effort.limit_s / 2
        while len(samples_s) < effort.warmup + effort.rounds[1] and (
            time.perf_counter() < end_s or len(samples_s) <= effort.warmup
        ):
            began_s = time.perf_counter()
            side.step()
            samples_s.append(time.perf_counter() - began_s)
    handle = comm.barrier_async()
    while not handle.done:
        time.sleep(_PAUSE_S)
    handle.wait()
    return float(comm.broadcast_obj(statistics.median(samples_s[effort.warmup :]) if samples_s else 0.0))


def _check_parameters(comm: Communicator, sides: list[_Side]) -> None:
    ours = sides[0].digest()
    problem = ""
    if not all(torch.equal(ours, other) for other in comm.allgather_obj(ours)):
        problem = "parameters: differ among the ranks after training steps; please report this"
    for rival in sides[1:]:
        theirs = rival.first_digest
        if not torch.allclose(
            sides[0].first_digest, theirs, rtol=_TOLERANCE, atol=_TOLERANCE * float(theirs.abs().max())
        ):
            problem = (
                problem or f"parameters: differ from those of {rival.name} after as many steps; please report this"
            )
    if found := next(filter(None, comm.allgather_obj(problem)), ""):
        raise RuntimeError(found)


def _over_ranks(comm: Communicator, values: list[float], op: str) -> list[float]:
    return [float(value) for value in comm.allreduce(np.array(values, np.float64), op=op)]


def _resident_nbytes() -> int:
    """Return how much memory this process has in use, without what it has freed and kept."""
    with contextlib.suppress(OSError, AttributeError):  # not the C library of GNU
        ctypes.CDLL(None).malloc_trim(0)
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:  # not Linux: the most that it has ever had
        # macOS counts in bytes, others in KiB.
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return pages * mmap.PAGESIZE
