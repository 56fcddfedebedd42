"""How times are taken: sides in turn, slowest rank of each round, median over rounds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

from mpi4py import MPI

__all__ = ["gloo_group", "interleaved_medians_s"]


def interleaved_medians_s(sides: Mapping[str, Callable[[], object]], repeats: int, warmup: int = 2) -> dict[str, float]:
    """Time each side `repeats` times, one after the other in every round, so that disturbances hit all alike.

    Returns:
        For each side the median over rounds, in seconds, of the time of the slowest rank; the same on every rank.
    """
    comm = MPI.COMM_WORLD
    times: dict[str, list[float]] = {name: [] for name in sides}
    for index in range(warmup + repeats):
        for name, run in sides.items():
            comm.Barrier()
            begin_s = time.perf_counter()
            run()
            elapsed_s = comm.allreduce(time.perf_counter() - begin_s, op=MPI.MAX)
            if index >= warmup:
                times[name].append(elapsed_s)
    return {name: statistics.median(values) for name, values in times.items()}


def gloo_group(folder: str) -> None:
    """Make torch.distributed's default group of all ranks on Gloo; `folder` is shared by the ranks."""
    import torch.distributed as dist

    comm = MPI.COMM_WORLD
    store = dist.FileStore(f"{folder}/gloo", comm.Get_size())
    dist.init_process_group("gloo", store=store, rank=comm.Get_rank(), world_size=comm.Get_size())
