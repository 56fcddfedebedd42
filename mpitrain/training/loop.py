"""The steps of synchronous data-parallel training, and where they stand."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from mpitrain.training.meter import Meter
from mpitrain.training.sampler import ShardedSampler

__all__ = ["TrainingLoop"]


class TrainingLoop:
    """Takes optimizer steps over sharded batches; stops and goes on anywhere, at any number of ranks.

        loop = TrainingLoop(model, optimizer, schedule, sampler, batch_size=64, batch_loss=batch_loss)
        for step in loop.run(1000):
            ...  # steps 1 to 1000: report, save `loop.state_dict()`, or leave the loop

    The batches are those of one process with this batch size, each divided among the ranks. With losses that
    are means over samples and gradients that are averaged over ranks, the steps are those of one process,
    too. The last samples of an epoch that make no full batch are left out.

    Args:
        model: Equal on all ranks.
        optimizer: Averages gradients over the ranks, as that of `mpitrain.torch.DistributedOptimizer` does.
        schedule: Learning rate by step; of this optimizer.
        sampler: Of all samples; its `drop_last` should be set, as the batches leave the rest out.
        batch_size: Samples per step of all ranks together; a multiple of their number.
        batch_loss: Returns the mean loss of the samples with these indices.
        max_grad_norm: Averaged gradients are scaled down to this norm; None leaves them alone.
        meter: Of the steps.

    Attributes:
        step: Steps taken so far.
        losses: Loss of this rank's part of the batch at each step since the loop was made.

    Raises:
        ValueError: The batch size does not fit the ranks or the samples.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        schedule: torch.optim.lr_scheduler.LRScheduler,
        sampler: ShardedSampler,
        *,
        batch_size: int,
        batch_loss: Callable[[Sequence[int]], torch.Tensor],
        max_grad_norm: float | None = None,
        meter: Meter | None = None,
    ) -> None:
        size = sampler.size
        if batch_size < 1 or batch_size % size:
            raise ValueError(
                f"batch size: must be a multiple of the number of ranks, got {batch_size} and {size} ranks; "
                f"use {max(1, round(batch_size / size)) * size}"
            )
        if batch_size > sampler.count:
            raise ValueError(f"batch size: must be at most the {sampler.count} samples, got {batch_size}; lower it")
        self.model = model
        self.optimizer = optimizer
        self.schedule = schedule
        self.sampler = sampler
        self.batch_size = batch_size
        self.meter = meter or Meter()
        self.step = 0
        self.losses: list[float] = []
        self._batch_loss = batch_loss
        self._max_grad_norm = max_grad_norm

    @property
    def steps_per_epoch(self) -> int:
        """Full batches in an epoch."""
        return self.sampler.count // self.batch_size

    def run(self, num_steps: int) -> Iterator[int]:
        """Go on until `num_steps` steps were taken in all; after each one yield how many that makes."""
        while self.step < num_steps:
            share = self.batch_size // self.sampler.size
            for indices in torch.utils.data.BatchSampler(self.sampler, share, drop_last=True):
                if self.step == num_steps:
                    return
                with self.meter.measure(self.batch_size):
                    self.losses.append(self._take_step(indices))
                self.step += 1
                self.sampler.record(self.batch_size)
                yield self.step
            if self.step < num_steps:
                self.sampler.next_epoch()

    def _take_step(self, indices: Sequence[int]) -> float:
        self.optimizer.zero_grad()
        loss = self._batch_loss(indices)
        loss.backward()  # type: ignore[no-untyped-call]
        if self._max_grad_norm is None:
            self.optimizer.step()
        else:
            self._take_clipped_step(self._max_grad_norm)
        self.schedule.step()
        return loss.item()

    def _take_clipped_step(self, max_grad_norm: float) -> None:
        optimizer: Any = self.optimizer
        # Clipped before they are averaged, gradients would be another batch's.
        optimizer.synchronize()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), max_grad_norm)
        with optimizer.skip_synchronize():
            optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        """Return all that it takes to go on, at any number of ranks; the same on every rank."""
        return {
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "sampler": self.sampler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where a loop of the same model and data stood."""
        self.sampler.load_state_dict(state["sampler"])
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.step = state["step"]
