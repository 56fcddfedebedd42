"""How many segments make a pipelined algorithm fastest."""

from __future__ import annotations

import math
from collections.abc import Callable

from mpitrain.schedules.algorithm import Algorithm
from mpitrain.schedules.network import Network
from mpitrain.schedules.price import Price, price

__all__ = ["best_num_segments"]

# The double tree stays below this up to 2**16 ranks.
_MAX_TRIED = 32


def best_num_segments(
    algorithm: Algorithm,
    nbytes: float,
    size: int,
    network: Network,
    *,
    root: int = 0,
    max_segments: int = 1024,
) -> int:
    """Return the number of segments, up to `max_segments`, with the lowest price.

    It is 1 for an algorithm that takes no segments.
    """
    if not algorithm.takes_segments or size == 1:
        return 1

    def priced(num_segments: int) -> Price:
        return price(algorithm, nbytes, size, network, root=root, num_segments=num_segments)

    # A segment is on its way for as many rounds as a single one takes. With at least that
    # many segments the pipeline fills up, and one more segment is one more full round.
    full = algorithm.rounds(size, 1)
    filling = _lowest(lambda count: priced(count).total_s, min(full, max_segments))
    if full >= max_segments:
        return filling
    streaming, streaming_s = _best_when_full(priced(full), priced(full + 1), full, max_segments)
    return filling if priced(filling).total_s <= streaming_s else streaming


def _lowest(total_s: Callable[[int], float], high: int) -> int:
    """Return where `total_s` is lowest from 1 to `high`."""
    if high <= _MAX_TRIED:
        return min(range(1, high + 1), key=total_s)
    # Too many to try them all: take it that the prices fall and then rise, as they do on a
    # chain without nodes.
    low = 1
    while low < high:
        middle = (low + high) // 2
        if total_s(middle) <= total_s(middle + 1):
            high = middle
        else:
            low = middle + 1
    return low


def _best_when_full(here: Price, further: Price, full: int, max_segments: int) -> tuple[int, float]:
    """Return the best number of segments from `full` on, and its price.

    With s segments the latencies sum up to a + b s; the transfers and reductions to
    (c + d s) n/s = n d + n c/s. The prices at `full` and `full` + 1 give b and n c, and
    the sum is lowest at s = sqrt(n c / b).
    """
    per_segment_s = further.latency_s - here.latency_s
    here_s = here.transfer_s + here.reduction_s
    further_s = further.transfer_s + further.reduction_s
    ramp_s = max(0.0, here_s - further_s) * full * (full + 1)
    ideal = math.sqrt(ramp_s / per_segment_s) if per_segment_s > 0 else math.inf

    def total_s(count: int) -> float:
        return here.total_s + per_segment_s * (count - full) - ramp_s * (1 / full - 1 / count)

    below = int(min(max(ideal, full), max_segments))
    best = min((below, min(below + 1, max_segments)), key=total_s)
    return best, total_s(best)
