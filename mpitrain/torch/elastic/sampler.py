"""Which samples of an epoch are done, and which this rank works on, at any number of ranks."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator, Mapping, Sized
from typing import Any

import torch

from mpitrain.torch.world import rank, size

__all__ = ["ElasticSampler"]


class ElasticSampler(torch.utils.data.Sampler[int]):
    """Indices for one rank, as many on every rank; goes on with what is left when the number of ranks has changed.

        sampler = hvd.elastic.ElasticSampler(dataset)
        loader = DataLoader(dataset, batch_size=32, sampler=sampler)
        state = hvd.elastic.TorchState(model, optimizer, sampler=sampler, epoch=0)
        ...
            for index, batch in enumerate(loader):
                ...
                state.sampler.record_batch(index, 32)
                state.commit()
            state.sampler.set_epoch(state.epoch + 1)

    What is left of the epoch when the sampler is `reset` is dealt out to the ranks in turn. Where it does not divide
    by their number, the first samples of what is left are taken once more.

    Args:
        dataset: Its length counts, which must stay the same.
        shuffle: A new order each epoch, which depends on seed and epoch only; else that of the indices.
        seed: Same on every rank.

    Attributes:
        epoch: See `set_epoch`.
        processed_num: That many samples at the beginning of the epoch's order are done.
        num_replicas: Ranks among which the rest was dealt out.
        rank: This one.
        remaining_indices: What was left of the epoch at the last reset, in its order.
        num_samples: How many of them each rank has, so that `total_size` is that of all ranks.
        total_size: See `num_samples`.

    Raises:
        NotInitializedError: Before `init`.
    """

    def __init__(self, dataset: Sized, shuffle: bool = True, seed: int = 0) -> None:
        self.dataset = dataset
        self.shuffle = shuffle
        self.seed = seed
        self.epoch = 0
        self.processed_num = 0
        # Done out of order, one by one.
        self._recorded: set[int] = set()
        # Of what was left at the last reset: places in the order, and how many are done, from the first on.
        self._positions: list[int] = []
        self._num_done = 0
        self.reset()

    def __iter__(self) -> Iterator[int]:
        padded = itertools.islice(itertools.cycle(self.remaining_indices), self.total_size)
        return itertools.islice(padded, self.rank, None, self.num_replicas)

    def __len__(self) -> int:
        """Samples that this rank had left at the last reset."""
        return self.num_samples

    @property
    def processed_indices(self) -> set[int]:
        """Indices of all samples of this epoch that are done, as far as this rank knows."""
        return self._recorded.union(self._order()[: self.processed_num])

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch, none of which is done. Call it after the last batch of the one before.

        Called before the first batch, it would forget what was done of an epoch that is taken up again.
        """
        self.epoch = epoch
        self.processed_num = 0
        self._recorded.clear()
        self.reset()

    def record_batch(self, batch_idx: int, batch_size: int) -> None:
        """Note that every rank is done with its next so many samples; every rank must, for each batch.

        Args:
            batch_idx: Not needed, as batches are recorded in their order; accepted as in Horovod.
            batch_size: Samples of each rank.
        """
        del batch_idx
        self._num_done = min(len(self._positions), self._num_done + batch_size * self.num_replicas)
        if self._num_done:
            # What lies between in the order was done before the reset.
            self.processed_num = self._positions[self._num_done - 1] + 1

    def record_indices(self, indices: Iterable[int]) -> None:
        """Note that samples are done, in any order and by this rank alone: `TorchState.sync` tells the others."""
        self._recorded.update(int(index) for index in indices)

    def state_dict(self) -> dict[str, Any]:
        """Return where the epoch stands; on every rank the same, but for what `record_indices` has noted."""
        state: dict[str, Any] = {"epoch": self.epoch, "processed_num": self.processed_num}
        if self._recorded:
            state["processed_indices"] = sorted(self._recorded)
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on where a sampler of the same data stood, at any number of ranks.

        Args:
            state_dict: Of this class, or of Horovod's, which has the one or the other of the two entries.
        """
        self.epoch = int(state_dict["epoch"])
        self.processed_num = int(state_dict.get("processed_num", 0))
        self._recorded = set(state_dict.get("processed_indices", ()))
        self.reset()

    def reset(self) -> None:
        """Deal out what is left among the ranks that there are now."""
        self.num_replicas, self.rank = size(), rank()
        order = self._order()
        self._positions = [
            position for position in range(self.processed_num, len(order)) if order[position] not in self._recorded
        ]
        self._num_done = 0
        self.remaining_indices = [order[position] for position in self._positions]
        self.num_samples = -(-len(self._positions) // self.num_replicas)
        self.total_size = self.num_samples * self.num_replicas

    def _order(self) -> list[int]:
        order = list(range(len(self.dataset)))
        if self.shuffle:
            # Horovod's order, so that what one of them has begun the other can end.
            random.Random(self.seed + self.epoch).shuffle(order)
        return order
