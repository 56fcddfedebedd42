"""How times are taken: sides in turn, slowest rank of each round, median over rounds.

Terms: a *side* is one of the things that are compared, such as an algorithm. In a *round* every side has its turn, so
that disturbances hit all alike; each round has an order of its own, so that none always follows the same one. A
*sample* is the time of one side in one round. It is taken in a loop as a user would write it: calls before, which do
not count, bring back to the caches what the side before has driven out. What is decided by times is decided by those
that all ranks have agreed on, so all ranks decide the same.
"""

from __future__ import annotations

import dataclasses
import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from mpitrain.collectives import Communicator

__all__ = ["Effort", "Sides", "Times", "interleaved_times"]

Sides = Mapping[str, Callable[[], object]]

# An operation is repeated without a pause in between until it has taken so long, as a clock and a barrier are coarse.
_LEAST_S = 1e-3
_MOST_REPEATS = 200
_MOST_OVERTIME = 2
# For so long calls are made before a sample. What takes longer has more data than caches hold and needs none.
_WARM_S = 5e-3
_LONGEST_WARMED_S = 20e-3
_MOST_WARMING = 8


@dataclasses.dataclass(frozen=True)
class Effort:
    """How thoroughly to measure.

    Attributes:
        rounds: The smallest and the largest number of rounds.
        limit_s: No further round is begun after so long, or after twice as long if they are too few.
        warmup: Rounds that do not count, at least 2: the first is for what is prepared once, the last tells how often
            to repeat.
    """

    rounds: tuple[int, int]
    limit_s: float
    warmup: int = 2


@dataclasses.dataclass(frozen=True)
class Times:
    """What came of timing several sides; the same on every rank.

    Attributes:
        samples_s: By side, for each round, the seconds of one call on the rank that was slowest in that round.
        repeats: By side, how many calls without a pause in between make up a sample.
        elapsed_s: How long all of it took.
    """

    samples_s: Mapping[str, tuple[float, ...]]
    repeats: Mapping[str, int]
    elapsed_s: float

    @property
    def medians_s(self) -> dict[str, float]:
        """By side the median of its samples."""
        return {name: statistics.median(samples) for name, samples in self.samples_s.items()}

    @property
    def noise(self) -> float:
        """By how much of the median half of the samples differ from it; that of most sides."""
        return statistics.median(
            statistics.median(abs(sample / median - 1) for sample in self.samples_s[name])
            for name, median in self.medians_s.items()
        )

    def percentile_s(self, name: str, percent: float) -> float:
        """Return the time below which so many percent of a side's samples are."""
        return float(np.percentile(self.samples_s[name], percent))


def interleaved_times(comm: Communicator, sides: Sides, effort: Effort) -> Times:
    """Time sides one after the other in every round.

    Args:
        comm: Of the ranks; every one must call.
        sides: By name a function that makes one call; the same names in the same order on every rank.
        effort: How thoroughly.
    """
    began_s = time.perf_counter()
    once = dict.fromkeys(sides, 1)
    first_s: Mapping[str, float] = {}
    elapsed_s = 0.0
    for _ in range(max(2, effort.warmup)):
        first_s, elapsed_s = _agree(comm, _time_all(comm, sides, once, list(sides), {}), began_s)
    repeats = {
        name: max(1, min(_MOST_REPEATS, int(_LEAST_S / max(seconds, 1e-9)))) for name, seconds in first_s.items()
    }
    warming = {
        name: min(math.ceil(_WARM_S / max(seconds, 1e-9)), max(_MOST_WARMING, repeats[name] // 2))
        for name, seconds in first_s.items()
        if seconds < _LONGEST_WARMED_S
    }
    least, most = effort.rounds
    limit_s = effort.limit_s
    measured: list[Mapping[str, float]] = []
    while len(measured) < most and (
        elapsed_s < limit_s or not measured or (len(measured) < least and elapsed_s < _MOST_OVERTIME * limit_s)
    ):
        order = random.Random(len(measured)).sample(list(sides), len(sides))  # the same on every rank
        times_s, elapsed_s = _agree(comm, _time_all(comm, sides, repeats, order, warming), began_s)
        measured.append(times_s)
    return Times({name: tuple(times_s[name] for times_s in measured) for name in sides}, repeats, elapsed_s)


def _time_all(
    comm: Communicator, sides: Sides, repeats: Mapping[str, int], order: Sequence[str], warming: Mapping[str, int]
) -> dict[str, float]:
    times_s = dict.fromkeys(sides, 0.0)
    for name in order:
        run, count = sides[name], repeats[name]
        for _ in range(warming.get(name, 0)):
            run()
        comm.barrier()
        begin_s = time.perf_counter()
        for _ in range(count):
            run()
        times_s[name] = (time.perf_counter() - begin_s) / count
    return times_s


def _agree(comm: Communicator, times_s: Mapping[str, float], began_s: float) -> tuple[dict[str, float], float]:
    """Return the times of the slowest rank, and how long it has been at it."""
    own = np.array([*times_s.values(), time.perf_counter() - began_s])
    slowest = comm.allreduce(own, op="max").tolist()
    return dict(zip(times_s, slowest[:-1], strict=True)), slowest[-1]
