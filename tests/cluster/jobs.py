"""What the ranks of the tests do: python jobs.py NAME. Rank 0 prints what was found as one line of JSON."""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from pathlib import Path

import numpy as np

# Divides by none of the numbers of ranks, and is more than one piece of the node's staging memory.
COUNT = 700_001


def whereabouts() -> dict[str, object]:
    """Node of every rank."""
    from mpitrain import Communicator

    comm = Communicator.from_mpi()
    node = comm.topology
    mine = {
        "host": socket.gethostname(),
        "local": [node.local_rank, node.local_size],
        "cross": [node.cross_rank, node.cross_size],
        "homogeneous": node.is_homogeneous,
        "algorithm": os.environ.get("MPITRAIN_ALGORITHM"),
    }
    return {"ranks": comm.allgather_obj(mine)}


def sums() -> dict[str, object]:
    """All-reduces by all algorithms, of ordinary and of shared arrays; how many elements are wrong on all ranks."""
    from mpitrain import Communicator

    comm = Communicator.from_mpi()
    wrong: dict[str, int] = {}
    index = np.arange(COUNT) % 1009
    # Sums are small whole numbers, which every dtype has exactly.
    total = sum(index * (rank + 1) for rank in range(comm.size))
    algorithms = comm.known_algorithms("allreduce")
    for algorithm in algorithms:
        for dtype in ("float32", "int64"):
            array = (index * (comm.rank + 1)).astype(dtype)
            comm.allreduce_(array, algorithm=algorithm)
            wrong[f"{algorithm}, {dtype}"] = int((array != total).sum())
    shared = comm.allocate(COUNT, "float32")
    for algorithm in {"auto", "hierarchical"} & set(algorithms):
        shared.numpy()[:] = index * (comm.rank + 1)
        comm.allreduce_(shared, algorithm=algorithm)
        wrong[f"{algorithm}, shared"] = int((shared.numpy() != total).sum())
    assert shared.is_shared
    everybodys = comm.allgather_obj(wrong)
    return {"wrong": {name: sum(each[name] for each in everybodys) for name in wrong}, "nodes": comm.topology.nodes}


def training() -> dict[str, object]:
    """Steps of an optimizer on a part of the batch per rank, and of one on all of it; the largest difference."""
    import torch

    import mpitrain.torch as hvd

    hvd.init()
    inputs = torch.arange(12.0 * hvd.size() * 8).reshape(12 * hvd.size(), 8).sin()
    alone, ours = torch.nn.Linear(8, 5), torch.nn.Linear(8, 5)
    for model in (alone, ours):
        with torch.no_grad():
            for param in model.parameters():
                param.copy_(torch.arange(float(param.numel())).cos().view_as(param))
    reference = torch.optim.SGD(alone.parameters(), lr=0.1)
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(ours.parameters(), lr=0.1), named_parameters=ours.named_parameters()
    )
    for _ in range(5):
        for model, stepper, part in ((alone, reference, inputs), (ours, optimizer, inputs[hvd.rank() :: hvd.size()])):
            stepper.zero_grad()
            model(part).square().mean().backward()
            stepper.step()
    pairs = zip(alone.parameters(), ours.parameters(), strict=True)
    difference = max(float((one - other).abs().max()) for one, other in pairs)
    return {"differences": hvd.communicator().allgather_obj(difference)}


def waiting() -> dict[str, object]:
    """All-reduces without end; a file says when they have begun."""
    from mpitrain import Communicator

    comm = Communicator.from_mpi()
    array = np.ones(1000, np.float32)
    for index in range(10**9):
        comm.allreduce_(array, op="max")
        if index == 5 and comm.rank == 0:
            Path(sys.argv[2]).touch()
        time.sleep(0.01)
    return {}


def failing() -> dict[str, object]:
    """The last rank fails, while the others know nothing of it."""
    from mpitrain import Communicator

    comm = Communicator.from_mpi()
    comm.barrier()
    if comm.rank == comm.size - 1:
        os._exit(7)
    time.sleep(60)
    return {}


JOBS = {job.__name__: job for job in (whereabouts, sums, training, waiting, failing)}

if __name__ == "__main__":
    found = JOBS[sys.argv[1]]()
    from mpi4py import MPI

    if MPI.COMM_WORLD.Get_rank() == 0:
        print(json.dumps(found), flush=True)
