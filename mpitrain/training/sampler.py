"""Which samples of an epoch this rank works on, and how many of them are done.

An epoch is one order of all samples, the same on every rank. Rank r of p takes every p-th sample of what is
left of it, beginning with the r-th. So what all ranks have taken together, so many each, is always a
beginning of the order: one number says what is done, whatever the number of ranks was.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch

__all__ = ["ShardedSampler"]


class ShardedSampler(torch.utils.data.Sampler[int]):
    """Indices for one rank, as many on every rank, for a `DataLoader` or a `BatchSampler`.

        sampler = ShardedSampler(len(dataset), comm.rank, comm.size, seed=1)
        for batch in DataLoader(dataset, batch_size=32, sampler=sampler):
            ...
            sampler.record(32 * comm.size)
        sampler.next_epoch()

    An iterator goes through what was left when it was made; a loader may run ahead of `record`.

    Args:
        count: Number of samples.
        rank: This rank.
        size: Number of ranks; each has a sampler.
        seed: Of the order; same on every rank.
        shuffle: A new order each epoch, which depends on the seed and the epoch only; else the order is that
            of the indices.
        drop_last: Where the rest of the epoch does not divide by `size`: leave out up to `size - 1` samples
            at its end. Else the first samples of the epoch are taken once more, so that every sample is used.

    Attributes:
        epoch: From 0.
        done: Samples of this epoch that all ranks together are done with.

    Raises:
        ValueError: An argument is out of range.
    """

    def __init__(
        self,
        count: int,
        rank: int,
        size: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = False,
    ) -> None:
        if count < 1:
            raise ValueError(f"count: must be at least 1, got {count}; pass the number of samples")
        if not 0 <= rank < size:
            raise ValueError(f"rank: must be 0 to size - 1, got {rank} and size {size}; pass those of one group")
        if seed < 0:
            raise ValueError(f"seed: must be 0 or more, got {seed}; pass the same number on every rank")
        self.count = count
        self.rank = rank
        self.size = size
        self.seed = seed
        self.shuffle = shuffle
        self.drop_last = drop_last
        self.epoch = 0
        self.done = 0

    def __iter__(self) -> Iterator[int]:
        order = self._order()
        left = order[self.done :]
        surplus = len(left) % self.size
        if surplus and self.drop_last:
            left = left[:-surplus]
        elif surplus:
            left += [order[index % self.count] for index in range(self.size - surplus)]
        return iter(left[self.rank :: self.size])

    def __len__(self) -> int:
        """Samples that are left for this rank."""
        left = self.count - self.done
        return left // self.size if self.drop_last else -(-left // self.size)

    def record(self, num_samples: int) -> None:
        """Note that all ranks together are done with so many samples more, what was taken twice included."""
        self.done = min(self.count, self.done + num_samples)

    def next_epoch(self) -> None:
        """Begin the next epoch, whatever is left of this one."""
        self.epoch += 1
        self.done = 0

    def state_dict(self) -> dict[str, int | bool]:
        """Return where the epoch stands, which is the same on every rank."""
        return {
            "count": self.count,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "epoch": self.epoch,
            "done": self.done,
        }

    def load_state_dict(self, state: Mapping[str, int | bool]) -> None:
        """Go on where a sampler stood, at any number of ranks, and in its order.

        Raises:
            ValueError: The state is that of another number of samples.
        """
        if state["count"] != self.count:
            raise ValueError(
                f"sampler: the state is that of {state['count']} samples, got {self.count}; use the same data"
            )
        self.seed = int(state["seed"])
        self.shuffle = bool(state["shuffle"])
        self.epoch = int(state["epoch"])
        self.done = int(state["done"])

    def _order(self) -> list[int]:
        if not self.shuffle:
            return list(range(self.count))
        order: list[int] = np.random.default_rng([self.seed, self.epoch]).permutation(self.count).tolist()
        return order
