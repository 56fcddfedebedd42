"""Measures all-reduces of device arrays on all ranks, and the rates of copies that limit them.

mpirun -np 2 python scripts/gpu/measure.py --json FILE
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gpu.limits import direct_limit_s, staged_limit_s
from mpitrain import Communicator, Settings
from mpitrain.collectives.plan import STRAIGHT, THROUGH_DEVICES
from mpitrain.memory import dtype_named
from mpitrain.memory.device import PinnedArray, describe_devices, device_of, load_cupy, streams_of

FLOAT32 = dtype_named("float32")


class Stopwatch:
    """Times what all ranks do together.

    Args:
        comm: Of the ranks.
        iterations: How often each thing is timed.
    """

    def __init__(self, comm: Communicator, iterations: int) -> None:
        self._comm = comm
        self._iterations = iterations

    def median_s(self, function: Callable[[], object]) -> float:
        """Return the median time of the slowest rank, from a barrier to the end of the call."""
        function()
        function()
        times = np.empty((1, self._iterations))
        for index in range(self._iterations):
            self._comm.barrier()
            begin_s = time.perf_counter()
            function()
            times[0, index] = time.perf_counter() - begin_s
        return float(statistics.median(self._comm.allgather(times).max(axis=0).tolist()))


class Bench:
    """The measurements of one number of ranks.

    Args:
        comm: Of the ranks, on one node.
        nbytes: Of each rank's array.
        iterations: How often each thing is timed.
    """

    def __init__(self, comm: Communicator, nbytes: int, iterations: int) -> None:
        self.comm = comm
        self.nbytes = nbytes
        self.count = nbytes // FLOAT32.itemsize
        self.device = device_of(comm.topology.local_rank)
        self.streams = streams_of(self.device)
        self.watch = Stopwatch(comm, iterations)
        self.cupy = load_cupy("check_gpu")
        devices = comm.allgather(np.array([self.device]))
        self.ranks_per_device = int(np.bincount(devices).max())

    def copy_rates(self) -> dict[str, float]:
        """Return rates in bytes per second.

        What a copy within a device reads and writes, by one rank alone; what each rank copies to the host, and from
        there, while all do.
        """
        source, target = self.cupy.zeros(self.count, np.float32), self.cupy.empty(self.count, np.float32)
        host = PinnedArray(FLOAT32, (self.count,)).flat
        alone_s = self.watch.median_s(lambda: self._copy(target, source) if self.comm.rank == 0 else None)
        return {
            "device_traffic": 2 * self.nbytes / alone_s,
            "to_host": self.nbytes / self.watch.median_s(lambda: self._copy(host, source)),
            "to_device": self.nbytes / self.watch.median_s(lambda: self._copy(target, host)),
        }

    def _copy(self, dest: Any, source: Any) -> None:
        with self.cupy.cuda.Device(self.device):
            self.streams.copy(dest, source, self.streams.compute)
            self.streams.compute.synchronize()

    def rows(self, rates: dict[str, float]) -> list[dict[str, Any]]:
        """Return the time and the limit of each path that there is."""
        rows = []
        if (direct_s := self._direct_s()) is not None:
            limit_s = direct_limit_s(self.nbytes, self.ranks_per_device, rates["device_traffic"])
            rows.append(self._row("direct", direct_s, limit_s))
        if (through_s := self._ordinary_s(THROUGH_DEVICES)) is not None:
            rows.append(self._row(THROUGH_DEVICES, through_s, None))
        staged_s, transfer_s = self._staged_s()
        limit_s = staged_limit_s(self.nbytes, rates["to_host"], rates["to_device"], transfer_s)
        rows += [self._row("staged", staged_s, limit_s), self._row("host array", transfer_s, None)]
        if (straight_s := self._ordinary_s(STRAIGHT, shared_device_memory=False)) is not None:
            rows.append(self._row("CUDA-aware", straight_s, None))
        return rows

    def _direct_s(self) -> float | None:
        array = self.comm.allocate(self.count, "float32", device="cuda")
        if not array.is_shared:
            return None
        return self.watch.median_s(lambda: self.comm.allreduce_(array, op="average"))

    def _staged_s(self) -> tuple[float, float]:
        comm = self.comm.duplicate(self.comm.settings.replace(cuda_aware="no", shared_device_memory=False))
        array, host = self._array(), PinnedArray(FLOAT32, (self.count,))
        host.flat[:] = self.comm.rank
        staged_s = self.watch.median_s(lambda: comm.allreduce_(array, op="average"))
        transfer_s = self.watch.median_s(lambda: comm.allreduce_(host, op="average"))
        comm.free()
        return staged_s, transfer_s

    def _ordinary_s(self, way: str, **settings: Any) -> float | None:
        """Return the time of an array that is not shared; None where it does not go that way."""
        comm, array = self.comm.duplicate(self.comm.settings.replace(**settings)), self._array()
        handle = comm.allreduce_async_(array, op="average")
        handle.wait()
        time_s = None
        if way in handle.description:
            time_s = self.watch.median_s(lambda: comm.allreduce_(array, op="average"))
        comm.free()
        return time_s

    def _array(self) -> Any:
        with self.cupy.cuda.Device(self.device):
            return self.cupy.full(self.count, self.comm.rank, np.float32)

    def _row(self, path: str, time_s: float, limit_s: float | None) -> dict[str, Any]:
        return {
            "path": path,
            "ranks": self.comm.size,
            "ranks_per_device": self.ranks_per_device,
            "nbytes": self.nbytes,
            "time_s": time_s,
            "limit_s": limit_s,
        }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; rank 0 writes what came of it."""
    parser = argparse.ArgumentParser(description="Measure all-reduces of device arrays.")
    parser.add_argument("--nbytes", type=int, default=256 << 20, help="of each rank's array of float32")
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args(arguments)
    comm = Communicator.from_mpi(settings=Settings.from_environ())
    bench = Bench(comm, options.nbytes, options.iterations)
    with bench.cupy.cuda.Device(bench.device):
        rates = bench.copy_rates()
        rows = bench.rows(rates)
    if comm.rank == 0:
        result = {"devices": describe_devices(), "rates": [{"ranks": comm.size, **rates}], "rows": rows}
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    comm.free()
    return 0


if __name__ == "__main__":
    sys.exit(main())
