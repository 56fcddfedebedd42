"""How long collectives take on a described cluster of any size: the prices of schedules, plus what is no schedule.

    time = call + the price of the rounds (`mpitrain.schedules.price`)
    time of an all-reduce in shared memory = shared call + 2(N-1) latencies + max(n / memory, 2(N-1)/N n / link)

where N is the number of nodes and n the size of the buffer; on one node only its memory counts. The MPI library's own
collectives have no price, as nobody knows which algorithms they are.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections import Counter

from mpitrain.collectives.selection import DIRECT, HIERARCHICAL, choose_num_segments
from mpitrain.collectives.table import Shape
from mpitrain.schedules import ALGORITHMS, Network, find_algorithm
from mpitrain.schedules.loads import Load, quick_loads
from mpitrain.schedules.price import price_of_loads

__all__ = ["Cluster", "priced_algorithms", "time_s"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cluster:
    """What times depend on besides algorithm, size and ranks; the defaults are those of a small cluster.

    Attributes:
        call_s: What every call takes before and after its rounds.
        shared_call_s: The same of an all-reduce in memory that the ranks of a node share.
        latency_s: Of a round within a node.
        cross_latency_s: Of a round in which a message goes to another node.
        bytes_per_s: Of the port of a rank, in each direction.
        reduction_bytes_per_s: Received bytes that a rank reduces per second.
        cross_bytes_per_s: Of the link of a node, in each direction.
        memory_bytes_per_s: Bytes of an array that the ranks of a node reduce per second in memory that they share.
    """

    call_s: float = 30e-6
    shared_call_s: float = 20e-6
    latency_s: float = 20e-6
    cross_latency_s: float = 60e-6
    bytes_per_s: float = 8e9
    reduction_bytes_per_s: float = 10e9
    cross_bytes_per_s: float = 1.25e9
    memory_bytes_per_s: float = 4e9

    def __post_init__(self) -> None:
        """Check that the values make sense.

        Raises:
            ValueError: Times below zero, or rates that are not positive.
        """
        for name, value in dataclasses.asdict(self).items():
            is_rate = name.endswith("_bytes_per_s") or name == "bytes_per_s"
            if not math.isfinite(value) or value < 0 or (is_rate and value == 0):
                raise ValueError(f"{name}: must be {'positive' if is_rate else 'zero or more'}, got {value}")


def priced_algorithms(collective: str, shape: Shape) -> list[str]:
    """Return the algorithms that have a price for a group.

    Raises:
        ValueError: No such collective.
    """
    if collective not in ALGORITHMS:
        raise ValueError(f"collective: unknown, got {collective!r}; use one of {', '.join(ALGORITHMS)}")
    shared = []
    if collective == "allreduce" and shape.largest > 1:
        shared = [DIRECT if shape.num_nodes == 1 else HIERARCHICAL]
    return [*shared, *ALGORITHMS[collective]]


def time_s(
    collective: str, name: str, nbytes: int, shape: Shape, cluster: Cluster, *, segment_nbytes: int = 1 << 19
) -> float:
    """Return the time of one call; ranks that are numbered node by node.

    Args:
        collective: A key of `ALGORITHMS`.
        name: One of `priced_algorithms`.
        nbytes: Size of the full buffer.
        shape: Of the group; all nodes count as those with the most ranks.
        cluster: What it runs on.
        segment_nbytes: See `mpitrain.config.Settings`.

    Raises:
        ValueError: No such collective or algorithm.
    """
    if collective == "allreduce" and name in (DIRECT, HIERARCHICAL):
        return cluster.shared_call_s + _shared_s(nbytes, shape, cluster)
    num_segments = choose_num_segments(nbytes, segment_nbytes)
    loads, num_chunks = _loads(collective, name, shape, num_segments)
    network = Network(
        latency_s=cluster.latency_s,
        bandwidth_bytes_per_s=cluster.bytes_per_s,
        reduction_bytes_per_s=cluster.reduction_bytes_per_s,
        ranks_per_node=shape.largest,
        internode_latency_s=cluster.cross_latency_s,
        internode_bandwidth_bytes_per_s=cluster.cross_bytes_per_s,
    )
    return cluster.call_s + price_of_loads(loads, nbytes / (num_chunks or 1), network).total_s


def _shared_s(nbytes: int, shape: Shape, cluster: Cluster) -> float:
    """Load and store on each node; between nodes a ring at the same time, of each slice on its own."""
    memory_s = nbytes / cluster.memory_bytes_per_s
    if shape.num_nodes == 1:
        return memory_s
    num_rounds = 2 * (shape.num_nodes - 1)
    cross_s = num_rounds / shape.num_nodes * nbytes / cluster.cross_bytes_per_s
    return num_rounds * cluster.cross_latency_s + max(memory_s, cross_s)


@functools.lru_cache(maxsize=1024)
def _loads(collective: str, name: str, shape: Shape, num_segments: int) -> tuple[Counter[Load], int]:
    """Return the loads of a schedule, and the chunks that a buffer is cut into."""
    algorithm = find_algorithm(collective, name)
    num_segments = num_segments if algorithm.takes_segments else 1
    loads = quick_loads(algorithm, shape.size, shape.largest, num_segments=num_segments)
    return loads, algorithm.chunks_per_buffer(shape.size, num_segments)
