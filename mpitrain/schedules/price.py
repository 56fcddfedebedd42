"""What an algorithm costs on a described network.

Terms: a round costs one latency, then the transfer through the busiest port or link, then the
reduction on the rank that reduces most; the price is the sum over the rounds. So
rounds count as synchronous, and the parts of a round as not overlapping.

What the rounds load is counted by `mpitrain.schedules.loads`, which also tells how long that takes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mpitrain.schedules.algorithm import Algorithm
from mpitrain.schedules.loads import Load, loads_of
from mpitrain.schedules.network import Network

__all__ = ["Network", "Price", "price", "price_of_loads"]


@dataclass(frozen=True, kw_only=True)
class Price:
    """The time of one collective, and what it consists of."""

    num_rounds: int
    latency_s: float
    transfer_s: float
    reduction_s: float

    @property
    def total_s(self) -> float:
        """The time from the start of the first round to the end of the last one."""
        return self.latency_s + self.transfer_s + self.reduction_s


def price(
    algorithm: Algorithm,
    nbytes: float,
    size: int,
    network: Network,
    *,
    root: int = 0,
    num_segments: int = 1,
) -> Price:
    """Return the time that `algorithm` takes for a buffer of `nbytes`.

    Args:
        algorithm: What to run.
        nbytes: Size of the full buffer (n), which is cut into equal chunks: the gathered or scattered buffer,
            or for an all-to-all the send buffer of one rank.
        size: Number of ranks.
        network: What to run it on.
        root: The root, where there is one.
        num_segments: The number of segments, where there are any.

    Raises:
        ValueError: An argument is out of range.
    """
    if nbytes < 0:
        raise ValueError(f"nbytes: negative, got {nbytes}; pass the size of the full buffer")
    loads = loads_of(algorithm, size, network.ranks_per_node, root=root, num_segments=num_segments)
    return price_of_loads(loads, nbytes / (algorithm.chunks_per_buffer(size, num_segments) or 1), network)


def price_of_loads(loads: Mapping[Load, int], chunk_nbytes: float, network: Network) -> Price:
    """Return the time of rounds that are known by what they load.

    Args:
        loads: How many rounds load how much, in chunks.
        chunk_nbytes: Size of a chunk.
        network: What to run them on; its nodes are those that the loads were counted for.
    """
    num_rounds = 0
    latency_s = transfer_s = reduction_s = 0.0
    for load, count in loads.items():
        num_rounds += count
        if load.has_messages:
            latency_s += count * network.message_latency_s(crosses_nodes=load.crosses_nodes)
        transfer_s += count * network.transfer_s(load.port * chunk_nbytes, load.link * chunk_nbytes)
        reduction_s += count * load.reduced * chunk_nbytes / network.reduction_bytes_per_s
    return Price(
        num_rounds=num_rounds,
        latency_s=latency_s,
        transfer_s=transfer_s,
        reduction_s=reduction_s,
    )
