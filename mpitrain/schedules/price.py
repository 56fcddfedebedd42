"""What an algorithm costs on a described network.

Terms: a round costs one latency, then the transfer through the busiest port or link, then the
reduction on the rank that reduces most; the price is the sum over the rounds. So
rounds count as synchronous, and the parts of a round as not overlapping.

Walking the rounds takes about a microsecond per rank and message. For symmetric algorithms
only the ranks of one node are walked, so that a ring of thousands of ranks costs
milliseconds; `broadcast_chain` is not symmetric and has p + s - 2 rounds, which makes
it slow to price above 2000 ranks.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from mpitrain.schedules.algorithm import Algorithm
from mpitrain.schedules.network import Network
from mpitrain.schedules.rounds import Receive, Round, Send

__all__ = ["Network", "Price", "price"]


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
    chunk_nbytes = nbytes / (algorithm.chunks_per_buffer(size, num_segments) or 1)
    ranks_per_node = _ranks_per_node(size, network)
    walked = _ranks_to_walk(algorithm, size, ranks_per_node)
    schedules = [algorithm.rounds_of(rank, size, root=root, num_segments=num_segments) for rank in walked]
    num_rounds = 0
    latency_s = transfer_s = reduction_s = 0.0
    for rounds in zip(*schedules, strict=True):
        num_rounds += 1
        load = _load_of(rounds, walked, ranks_per_node)
        if load.has_messages:
            latency_s += network.message_latency_s(crosses_nodes=load.crosses_nodes)
        transfer_s += network.transfer_s(load.port * chunk_nbytes, load.link * chunk_nbytes)
        reduction_s += load.reduced * chunk_nbytes / network.reduction_bytes_per_s
    return Price(
        num_rounds=num_rounds,
        latency_s=latency_s,
        transfer_s=transfer_s,
        reduction_s=reduction_s,
    )


def _ranks_per_node(size: int, network: Network) -> int:
    """Return the length of a node, which is `size` if nodes play no role."""
    return size if network.ranks_per_node is None else min(network.ranks_per_node, size)


def _ranks_to_walk(algorithm: Algorithm, size: int, ranks_per_node: int) -> range:
    """Return ranks among which are the busiest port and all ranks of the busiest node."""
    if not algorithm.is_symmetric:
        return range(size)
    if ranks_per_node == size:
        # All ranks do the same and no message leaves the node.
        return range(1)
    # When all ranks send d ranks further, a node of m ranks keeps m - d and m - (p - d) of
    # its messages, where these are positive. So all full nodes are alike, and a last one that
    # is not full is no busier: the messages that leave a node do not become fewer with m up
    # to max(d, p - d) >= p/2; and beside a node of more than p/2 ranks there is only one
    # other, which gets as many messages as it sends.
    return range(ranks_per_node)


class _Load(NamedTuple):
    """The busiest part of each kind in one round, in chunks."""

    port: int
    link: int
    reduced: int
    crosses_nodes: bool
    has_messages: bool


def _load_of(rounds: Iterable[Round], ranks: range, ranks_per_node: int) -> _Load:
    port = reduced = 0
    has_messages = False
    # Per node and direction; a key exists as soon as a message crosses, even an empty one.
    links: dict[tuple[int, bool], int] = {}
    for rank, current in zip(ranks, rounds, strict=True):
        if not current.sends and not current.receives:
            continue
        has_messages = True
        port = max(port, _num_chunks(current.sends), _num_chunks(current.receives))
        reduced = max(reduced, _num_chunks(each for each in current.receives if each.reduce))
        node = rank // ranks_per_node
        for is_out, messages in ((True, current.sends), (False, current.receives)):
            for message in messages:
                if message.peer // ranks_per_node != node:
                    key = node, is_out
                    links[key] = links.get(key, 0) + message.stop - message.start
    return _Load(port, max(links.values(), default=0), reduced, bool(links), has_messages)


def _num_chunks(messages: Iterable[Send | Receive]) -> int:
    return sum(message.stop - message.start for message in messages)
