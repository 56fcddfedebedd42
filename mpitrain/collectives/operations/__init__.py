"""The collectives, one file each: what is checked, which memory is used, what is returned."""

from mpitrain.collectives.operations.allgather import plan_allgather
from mpitrain.collectives.operations.allreduce import plan_allreduce
from mpitrain.collectives.operations.alltoall import plan_alltoall
from mpitrain.collectives.operations.barrier import plan_barrier
from mpitrain.collectives.operations.broadcast import plan_broadcast
from mpitrain.collectives.operations.gather import plan_gather
from mpitrain.collectives.operations.reduce import plan_reduce
from mpitrain.collectives.operations.reduce_scatter import plan_reduce_scatter
from mpitrain.collectives.operations.scatter import plan_scatter

__all__ = [
    "plan_allgather",
    "plan_allreduce",
    "plan_alltoall",
    "plan_barrier",
    "plan_broadcast",
    "plan_gather",
    "plan_reduce",
    "plan_reduce_scatter",
    "plan_scatter",
]
