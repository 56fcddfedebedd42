"""Training step of an MLP with 25 million parameters: alone, with DDP on Gloo, with DistributedOptimizer, in one run.

mpirun -np 2 python tests/benchmarks/training_step.py
"""

from __future__ import annotations

import argparse
import itertools
import json
import pathlib
import tempfile
from collections.abc import Callable

import torch
import torch.distributed as dist
from measure import gloo_group, interleaved_medians_s
from mpi4py import MPI
from torch.nn.parallel import DistributedDataParallel

import mpitrain.torch as hvd

WIDTHS = (1024, 3072, 3072, 3072, 1024)


def mlp() -> torch.nn.Sequential:
    """Return the model: 25.2 million parameters, the same on every rank."""
    torch.manual_seed(0)
    layers: list[torch.nn.Module] = []
    for width, next_width in itertools.pairwise(WIDTHS):
        layers += [torch.nn.Linear(width, next_width), torch.nn.ReLU()]
    return torch.nn.Sequential(*layers[:-1])


def step_of(model: torch.nn.Module, optimizer: torch.optim.Optimizer, batch: int) -> Callable[[], None]:
    """Return a function that makes one training step."""
    generator = torch.Generator().manual_seed(hvd.rank())
    inputs = torch.randn(batch, WIDTHS[0], generator=generator)
    targets = torch.randn(batch, WIDTHS[-1], generator=generator)

    def step() -> None:
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(model(inputs), targets).backward()
        optimizer.step()

    return step


def digest(model: torch.nn.Module) -> list[float]:
    """Return a few sums of the parameters, to compare sides and ranks."""
    return [float(param.detach().double().sum()) for param in model.parameters()]


def main() -> None:
    """Measure the three sides and print a table on rank 0."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=64, help="samples per rank")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", type=pathlib.Path, help="write the medians, in seconds, to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    hvd.init()
    with tempfile.TemporaryDirectory() as folder:
        gloo_group(MPI.COMM_WORLD.bcast(folder))
        alone, ours = mlp(), mlp()
        ddp = DistributedDataParallel(mlp())
        optimizers = [torch.optim.SGD(model.parameters(), lr=0.01) for model in (alone, ddp, ours)]
        optimizers[2] = hvd.DistributedOptimizer(optimizers[2], named_parameters=ours.named_parameters())
        sides = {
            "no synchronisation": step_of(alone, optimizers[0], options.batch),
            "DDP on Gloo": step_of(ddp, optimizers[1], options.batch),
            "DistributedOptimizer": step_of(ours, optimizers[2], options.batch),
        }
        medians_s = interleaved_medians_s(sides, options.repeats, warmup=3)
        everybodys = MPI.COMM_WORLD.allgather(digest(ours))
        assert all(sums == everybodys[0] for sums in everybodys), "ranks have different parameters"
        theirs = torch.tensor(digest(ddp.module))
        assert torch.allclose(torch.tensor(digest(ours)), theirs, atol=1e-3), "differs from DDP"
        dist.destroy_process_group()
    if hvd.rank() == 0:
        alone_s, ddp_s = medians_s["no synchronisation"], medians_s["DDP on Gloo"]
        count = sum(param.numel() for param in ours.parameters())
        print(f"# step of an MLP, {count / 1e6:.1f} M parameters, {hvd.size()} ranks, batch {options.batch} per rank")
        print(f"{'side':<22} {'step_ms':>8} {'added_ms':>9} {'vs DDP':>7}")
        for name, median_s in medians_s.items():
            added_ms = (median_s - alone_s) * 1e3
            print(f"{name:<22} {median_s * 1e3:>8.1f} {added_ms:>9.1f} {ddp_s / median_s:>6.2f}x")
        if options.json:
            facts = {"ranks": hvd.size(), "parameters": count, "medians_s": medians_s}
            options.json.write_text(json.dumps(facts), encoding="utf-8")


if __name__ == "__main__":
    main()
