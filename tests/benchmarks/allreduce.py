"""All-reduce of float32 in place: our algorithms beside MPI_Allreduce and Gloo, in one run.

    mpirun -np 2 python tests/benchmarks/allreduce.py

busbw is bytes / time x 2(p-1)/p, as in nccl-tests.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import tempfile

import numpy as np
import torch
import torch.distributed as dist
from measure import gloo_group, interleaved_medians_s
from mpi4py import MPI

from mpitrain import Communicator

SIZES_NBYTES = (1 << 10, 1 << 14, 1 << 18, 1 << 20, 1 << 22, 1 << 25, 1 << 27)
ALGORITHMS = ("ring", "halving_doubling", "auto")
SHARED = "auto, shared"


def measure(comm: Communicator, nbytes: int, seconds: float) -> dict[str, float]:
    """Return the median time of each side in seconds.

    All work on an ordinary array in place, but for the one that has a buffer in shared memory.
    """
    native = MPI.COMM_WORLD.Dup()
    array = np.zeros(nbytes // 4, np.float32)
    tensor = torch.from_numpy(array)
    sides = {
        "MPI_Allreduce": lambda: native.Allreduce(MPI.IN_PLACE, array),
        "Gloo": lambda: dist.all_reduce(tensor),
    }
    names = [name for name in comm.known_algorithms("allreduce") if name in (*ALGORITHMS, "direct", "hierarchical")]
    for name in names:
        sides[name] = comm.plan_allreduce_(array, algorithm=name).run
    shared = comm.allocate(nbytes // 4, "float32")
    sides[SHARED] = comm.plan_allreduce_(shared).run
    once_s = interleaved_medians_s(sides, repeats=3)
    repeats = int(np.clip(seconds / sum(once_s.values()), 5, 300))
    medians_s = interleaved_medians_s(sides, MPI.COMM_WORLD.bcast(repeats))
    native.Free()
    sides.clear()
    del shared
    return medians_s


def check(comm: Communicator) -> None:
    """Fail if an algorithm that is measured does not add up."""
    for name in ALGORITHMS:
        array = np.arange(1001, dtype=np.float32) * (comm.rank + 1)
        comm.allreduce_(array, algorithm=name)
        expected = np.arange(1001, dtype=np.float32) * (comm.size * (comm.size + 1) // 2)
        assert np.array_equal(array, expected), name


def main() -> None:
    """Measure all sizes and print a table on rank 0."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=4.0, help="time for each size")
    parser.add_argument("--json", type=pathlib.Path, help="write the medians, in seconds, to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    comm = Communicator.from_mpi()
    check(comm)
    results = {}
    factor = 2 * (comm.size - 1) / comm.size
    with tempfile.TemporaryDirectory() as folder:
        gloo_group(MPI.COMM_WORLD.bcast(folder))
        if comm.rank == 0:
            print(f"# all-reduce, float32, in place, {comm.size} ranks, {MPI.Get_library_version().splitlines()[0]}")
            print(f"{'bytes':>10} {'side':<18} {'time_us':>10} {'busbw_GB/s':>11} {'vs MPI':>7} {'vs Gloo':>8}")
        for nbytes in SIZES_NBYTES:
            results[nbytes] = medians_s = measure(comm, nbytes, options.seconds)
            for name, median_s in medians_s.items():
                if comm.rank == 0:
                    busbw = nbytes / median_s * factor / 1e9
                    versus_mpi = medians_s["MPI_Allreduce"] / median_s
                    versus_gloo = medians_s["Gloo"] / median_s
                    print(
                        f"{nbytes:>10} {name:<18} {median_s * 1e6:>10.1f} {busbw:>11.2f} "
                        f"{versus_mpi:>6.2f}x {versus_gloo:>7.2f}x",
                        flush=True,
                    )
        dist.destroy_process_group()
    if options.json and comm.rank == 0:
        options.json.write_text(json.dumps({"ranks": comm.size, "medians_s": results}), encoding="utf-8")


if __name__ == "__main__":
    main()
