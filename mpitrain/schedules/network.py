"""The network that a schedule is priced on."""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["Network"]


@dataclass(frozen=True, kw_only=True)
class Network:
    """Ranks with one port each, on one node or on nodes with one link each.

    Ports and links are full duplex: both directions have the whole bandwidth. Messages that use the
    same port in the same direction and round share it. A message to another
    node also passes the links of both nodes, which are shared by all their ranks.

    Attributes:
        latency_s: Time of an empty message.
        bandwidth_bytes_per_s: Of the port of a rank, in each direction.
        reduction_bytes_per_s: Received bytes that a rank reduces per second.
        ranks_per_node: Rank r is on node r // ranks_per_node. None: nodes play no role.
        internode_latency_s: Time of an empty message to another node; None: `latency_s`.
        internode_bandwidth_bytes_per_s: Of the link of a node, in each direction. None: the
            link holds nothing up.
    """

    latency_s: float
    bandwidth_bytes_per_s: float
    reduction_bytes_per_s: float = math.inf
    ranks_per_node: int | None = None
    internode_latency_s: float | None = None
    internode_bandwidth_bytes_per_s: float | None = None

    def __post_init__(self) -> None:
        """Check that the values make sense."""
        _check("latency_s", self.latency_s, is_valid=self.latency_s >= 0)
        _check("internode_latency_s", self.internode_latency_s, is_valid=(self.internode_latency_s or 0) >= 0)
        _check(
            "ranks_per_node",
            self.ranks_per_node,
            is_valid=self.ranks_per_node is None or self.ranks_per_node >= 1,
        )
        for name in ("bandwidth_bytes_per_s", "reduction_bytes_per_s", "internode_bandwidth_bytes_per_s"):
            rate: float | None = getattr(self, name)
            _check(name, rate, is_valid=rate is None or rate > 0)

    def message_latency_s(self, *, crosses_nodes: bool) -> float:
        """Return the time of an empty message."""
        if crosses_nodes and self.internode_latency_s is not None:
            return self.internode_latency_s
        return self.latency_s

    def transfer_s(self, port_nbytes: float, link_nbytes: float) -> float:
        """Return the time until the busiest port and the busiest link are through."""
        link_bandwidth = self.internode_bandwidth_bytes_per_s or math.inf
        return max(port_nbytes / self.bandwidth_bytes_per_s, link_nbytes / link_bandwidth)


def _check(name: str, value: float | None, *, is_valid: bool) -> None:
    if not is_valid:
        raise ValueError(f"{name}: out of range, got {value}; times must not be negative, rates must be positive")
