"""How fast an all-reduce can be, from rates that were measured in the same run. Pure arithmetic.

All times are for an array of `nbytes` on each rank, in place. A rate is in bytes per second.
"""

from __future__ import annotations

__all__ = ["direct_limit_s", "share_of_limit", "staged_limit_s"]


def direct_limit_s(nbytes: int, ranks_per_device: int, traffic_rate: float) -> float:
    """Return the least time of the direct all-reduce: what passes through the memory of one device, at its rate.

    Each rank's array is read once and written once, wherever the ranks are that do it; several arrays lie on one device
    if ranks share it.

    Args:
        nbytes: Of each rank's array.
        ranks_per_device: How many arrays the memory of a device holds.
        traffic_rate: What a copy within the device reads and writes, per second: twice what it copies.
    """
    return 2 * nbytes * ranks_per_device / traffic_rate


def staged_limit_s(nbytes: int, to_host_rate: float, to_device_rate: float, transfer_s: float) -> float:
    """Return the least time of an all-reduce by way of the host: the slowest of what is done at the same time.

    Args:
        nbytes: Of each rank's array.
        to_host_rate: At which each rank copies to pinned memory while all of them do.
        to_device_rate: The same for copies from there.
        transfer_s: The time of the all-reduce of an array of the host, of the same size and by the same algorithm.
    """
    return max(nbytes / to_host_rate, nbytes / to_device_rate, transfer_s)


def share_of_limit(limit_s: float, measured_s: float) -> float:
    """Return which part of the possible rate was reached; 1 is all of it."""
    return limit_s / measured_s
