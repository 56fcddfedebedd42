"""Which ranks share a node, and how many cores each of them has."""

from __future__ import annotations

import dataclasses
import os

from mpitrain.comm.base import Transport

__all__ = ["Topology"]


@dataclasses.dataclass(frozen=True, slots=True)
class Topology:
    """The ranks of a communicator by node.

    Attributes:
        rank: This rank.
        nodes: Ranks of each node, ascending; nodes ordered by their lowest rank.
        node_index: Index in `nodes` of this rank's node.
        cores_per_rank: Cores that the ranks of this node may use, divided by their number.
    """

    rank: int
    nodes: tuple[tuple[int, ...], ...]
    node_index: int
    cores_per_rank: float

    @classmethod
    def discover(cls, transport: Transport) -> Topology:
        """Ask all ranks where they are. Every rank must call."""
        leader = transport.node_leader()
        answers = transport.gather_everywhere((leader, sorted(_usable_cores())))
        by_leader: dict[int, list[int]] = {}
        for rank, (rank_leader, _) in enumerate(answers):
            by_leader.setdefault(rank_leader, []).append(rank)
        leaders = sorted(by_leader)
        local = by_leader[leader]
        cores = set().union(*(answers[rank][1] for rank in local))
        return cls(
            rank=transport.rank,
            nodes=tuple(tuple(by_leader[leader]) for leader in leaders),
            node_index=leaders.index(leader),
            cores_per_rank=len(cores) / len(local),
        )

    @property
    def local_ranks(self) -> tuple[int, ...]:
        """The ranks of this node, ascending."""
        return self.nodes[self.node_index]

    @property
    def local_rank(self) -> int:
        """Position of this rank among the ranks of its node."""
        return self.local_ranks.index(self.rank)

    @property
    def local_size(self) -> int:
        """Number of ranks on this node."""
        return len(self.local_ranks)

    @property
    def cross_ranks(self) -> tuple[int, ...]:
        """The ranks that have this rank's local rank, one of each node that has so many."""
        local_rank = self.local_rank
        return tuple(node[local_rank] for node in self.nodes if len(node) > local_rank)

    @property
    def cross_rank(self) -> int:
        """Position of this rank among `cross_ranks`."""
        return self.cross_ranks.index(self.rank)

    @property
    def cross_size(self) -> int:
        """Number of nodes that have a rank with this local rank."""
        return len(self.cross_ranks)

    @property
    def is_homogeneous(self) -> bool:
        """Whether all nodes have the same number of ranks."""
        return len({len(node) for node in self.nodes}) == 1


def _usable_cores() -> set[int]:
    try:
        return os.sched_getaffinity(0)
    except AttributeError:  # not Linux
        return set(range(os.cpu_count() or 1))
