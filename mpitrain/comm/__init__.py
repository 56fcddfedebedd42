"""Who the ranks are, where they run, and how messages get from one to another.

`comm.mpi` is not imported here, so that the in-process ranks work on a machine without MPI.
"""

from mpitrain.comm.base import Bytes, Request, Transport
from mpitrain.comm.thread import ThreadTransport, ThreadWorld, run_ranks
from mpitrain.comm.topology import Topology
from mpitrain.comm.waiting import Backoff

__all__ = [
    "Backoff",
    "Bytes",
    "Request",
    "ThreadTransport",
    "ThreadWorld",
    "Topology",
    "Transport",
    "run_ranks",
]
