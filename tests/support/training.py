"""Training of small models: on shards of the batch by all ranks, and on the whole batch by one process."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import pytest
import torch

import mpitrain.torch as hvd

ROWS = 12  # divides by 1, 2, 3 and 4 ranks

needs_peers = pytest.mark.mpi(min_size=2)


@contextlib.contextmanager
def initialized(bucket_nbytes: str | None = None) -> Iterator[None]:
    """Init and shutdown; parameters of the models below lie in several buckets of 64 bytes, in one or two of None."""
    limits = {f"MPITRAIN_{name}_NBYTES": bucket_nbytes for name in ("BUCKET", "FIRST_BUCKET")}
    os.environ.update({name: limit for name, limit in limits.items() if limit})
    hvd.init()
    yield
    hvd.shutdown()
    for name in limits:
        os.environ.pop(name, None)


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.first = torch.nn.Linear(6, 16)
        self.middle = torch.nn.Linear(16, 16)
        self.last = torch.nn.Linear(16, 3)

    def forward(self, inputs):
        return self.last(torch.tanh(self.middle(torch.tanh(self.first(inputs)))))


def batch(step, rows=ROWS):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(rows, 6, generator=generator), torch.randn(rows, 3, generator=generator)


def shard(tensor):
    return tensor[hvd.rank() :: hvd.size()]


def loss_of(model, step, take=lambda tensor: tensor):
    inputs, targets = batch(step)
    return torch.nn.functional.mse_loss(model(take(inputs)), take(targets))


def assert_follows(model, reference, tolerance=1e-5):
    for (name, mine), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance, msg=lambda text: f"{name}: {text}")  # noqa: B023
    assert_same_bits(model)


def assert_same_bits(model):
    mine = [parameter.detach().to(torch.float64).tolist() for parameter in model.parameters()]
    assert all(theirs == mine for theirs in hvd.allgather_object(mine))


OPTIMIZERS = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=1e-3),
    "adam": lambda params: torch.optim.Adam(params, lr=1e-2),
    "adamw, not foreach": lambda params: torch.optim.AdamW(params, lr=1e-2, foreach=False),
}


def sgd(params, lr=0.1):
    return torch.optim.SGD(params, lr=lr, momentum=0.9)


def pair(make=sgd, **options):
    """A model whose optimizer is distributed, and its twin in one process."""
    model, reference = Net(), Net()
    optimizer = hvd.DistributedOptimizer(make(model.parameters()), **options)
    return model, optimizer, reference, make(reference.parameters())


def train_both(model, optimizer, reference, single, step):
    optimizer.zero_grad()
    loss_of(model, step, shard).backward()
    optimizer.step()
    single.zero_grad()
    loss_of(reference, step).backward()
    single.step()
