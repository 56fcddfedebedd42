"""Does communication run during the backward pass? Step times and counters, and a timeline to look at.

    mpirun -np 2 python tests/cluster/overlap.py [--timeline overlap.json]

Run it on ranks of one node, which fill its cores, and across nodes, where waiting is on the network. Sides:

- alone: a step without synchronisation;
- communication: the all-reduce of all gradients and nothing else;
- after backward: the same buckets, all started when the backward pass has ended;
- during backward: what DistributedOptimizer does.

With perfect overlap the last one takes the longer of the first two, without any their sum.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import pathlib
import statistics
import time
from collections.abc import Callable, Mapping

import torch
from mpi4py import MPI

import mpitrain.torch as hvd
from mpitrain.config import Settings
from mpitrain.observe import CommunicationCounters

WIDTH = 1024


def mlp(depth: int) -> torch.nn.Sequential:
    """Return the model, the same on every rank: gradients of 4 MiB come at even times."""
    torch.manual_seed(0)
    return torch.nn.Sequential(
        *itertools.chain.from_iterable((torch.nn.Linear(WIDTH, WIDTH), torch.nn.ReLU()) for _ in range(depth))
    )


def interleaved_medians_s(sides: Mapping[str, Callable[[], None]], repeats: int, warmup: int) -> dict[str, float]:
    """Time the sides in turn; return the median over rounds, in seconds, of the slowest rank of each."""
    comm = MPI.COMM_WORLD
    times: dict[str, list[float]] = {name: [] for name in sides}
    for index in range(warmup + repeats):
        for name, run in sides.items():
            comm.Barrier()
            began_s = time.perf_counter()
            run()
            elapsed_s = comm.allreduce(time.perf_counter() - began_s, op=MPI.MAX)
            if index >= warmup:
                times[name].append(elapsed_s)
    return {name: statistics.median(values) for name, values in times.items()}


def step_of(model: torch.nn.Module, optimizer: torch.optim.Optimizer, batch: int) -> Callable[[], None]:
    """Return a function that makes one training step."""
    generator = torch.Generator().manual_seed(hvd.rank())
    inputs = torch.randn(batch, WIDTH, generator=generator)
    targets = torch.randn(batch, WIDTH, generator=generator)

    def step() -> None:
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(model(inputs), targets).backward()
        optimizer.step()

    return step


def all_reduce_of(model: torch.nn.Module, bucket_nbytes: int) -> Callable[[], None]:
    """Return a function that all-reduces as many bytes as the gradients have, in buckets, in the background."""
    comm = hvd.communicator().duplicate()
    count = sum(param.numel() for param in model.parameters())
    counts = [min(bucket_nbytes // 4, count - first) for first in range(0, count, bucket_nbytes // 4)]
    buffers = [comm.allocate(each, "float32") for each in counts]
    plans = [comm.plan_allreduce_(buffer) for buffer in buffers]

    def communicate() -> None:
        for handle in [plan.start() for plan in plans]:
            handle.wait()

    return communicate


def after_backward_of(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, batch: int, communicate: Callable[[], None]
) -> Callable[[], None]:
    """Return a function that makes a step, and communicates as many bytes when the backward pass has ended."""
    step = step_of(model, optimizer, batch)

    def step_then_communicate() -> None:
        step()
        communicate()

    return step_then_communicate


def main() -> None:
    """Measure the sides and print a table on rank 0."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--depth", type=int, default=12, help="layers of a million parameters each")
    parser.add_argument("--batch", type=int, default=256, help="samples per rank")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--timeline", type=pathlib.Path, help="write a timeline of three further steps to this file")
    parser.add_argument("--json", type=pathlib.Path, help="write the results, in seconds, to this file")
    parser.add_argument(
        "--pin", action="store_true", help="give each rank one core, as emulated hosts do not by themselves"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.pin:
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[MPI.COMM_WORLD.rank % len(cores)]})
    settings = Settings.from_environ()
    hvd.init(settings=settings)
    alone, after, during = (mlp(options.depth) for _ in range(3))
    communicate = all_reduce_of(during, settings.bucket_nbytes)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.01) for model in (alone, after, during)]
    optimizers[2] = hvd.DistributedOptimizer(optimizers[2], named_parameters=during.named_parameters())
    spent: list[CommunicationCounters] = []
    step_during = step_of(during, optimizers[2], options.batch)

    def counted_step() -> None:
        before = hvd.communication_counters()
        step_during()
        spent.append(hvd.communication_counters() - before)

    sides = {
        "alone": step_of(alone, optimizers[0], options.batch),
        "communication": communicate,
        "after backward": after_backward_of(after, optimizers[1], options.batch, communicate),
        "during backward": counted_step,
    }
    medians_s = interleaved_medians_s(sides, options.repeats, warmup=3)
    measured = spent[3:]
    if options.timeline:
        hvd.barrier()
        hvd.start_timeline(options.timeline)
        for _ in range(3):
            step_during()
        hvd.barrier()
        hvd.stop_timeline()
        hvd.barrier()
    exposed_s = max(MPI.COMM_WORLD.allgather(sorted(each.exposed_s for each in measured)[len(measured) // 2]))
    hidden_s = max(MPI.COMM_WORLD.allgather(sorted(each.hidden_s for each in measured)[len(measured) // 2]))
    if hvd.rank() == 0:
        count = sum(param.numel() for param in during.parameters())
        nodes = hvd.size() // hvd.local_size()
        print(f"# MLP of {count / 1e6:.1f} M parameters, batch {options.batch}, {hvd.size()} ranks on {nodes} node(s)")
        alone_s, communication_s = medians_s["alone"], medians_s["communication"]
        print(f"{'side':<18} {'ms':>8} {'added_ms':>9}")
        for name, median_s in medians_s.items():
            print(f"{name:<18} {median_s * 1e3:>8.1f} {(median_s - alone_s) * 1e3:>9.1f}")
        added_s = medians_s["during backward"] - alone_s
        print(f"{'ideal':<18} {max(alone_s, communication_s) * 1e3:>8.1f}")
        print(f"communication of a step: exposed {exposed_s * 1e3:.1f} ms, hidden {hidden_s * 1e3:.1f} ms")
        print(f"of the communication's time {1 - added_s / communication_s:.0%} cost the step nothing")
        if options.json:
            facts = {"ranks": hvd.size(), "medians_s": medians_s, "exposed_s": exposed_s, "hidden_s": hidden_s}
            options.json.write_text(json.dumps(facts), encoding="utf-8")


if __name__ == "__main__":
    main()
