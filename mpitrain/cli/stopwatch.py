"""How times are taken: algorithms in turn, slowest rank of each round, median over rounds.

What is decided by times is decided by those that all ranks have agreed on, so all ranks decide the same.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from mpitrain.collectives import Communicator
from mpitrain.collectives.layout import even_counts
from mpitrain.collectives.table import Key

__all__ = ["Times", "interleaved_times", "operation"]

# An operation is repeated without a pause in between until it has taken so long, as a clock and a barrier are coarse.
_LEAST_S = 1e-3
_MOST_REPEATS = 50
# How long the caller looks away from an operation in the background. A thread that looked all the time would
# take the interpreter from the one that does the work.
_AWAY_S = 20e-6
_MOST_OVERTIME = 2
_ITEM_NBYTES = 4


def operation(comm: Communicator, key: Key, nbytes: int) -> Callable[[str], None] | None:
    """Return a function that runs a collective once, by the algorithm that is passed, on a buffer of so many bytes.

    Every rank must call. None, on all ranks, where the node has not so much memory to share.
    """
    count = max(1, nbytes // _ITEM_NBYTES)
    if key.collective == "allgather":
        count = even_counts(count, comm.size)[-1]
    array: Any = comm.allocate(count, "float32") if key.in_window else np.empty(count, np.float32)
    if key.in_window and not array.is_shared:
        return None
    # Written, so that it has memory of its own; zero stays zero however often it is summed.
    (array.numpy() if key.in_window else array).fill(0)
    verb = key.collective + ("" if key.blocking else "_async")
    run = getattr(comm, verb + ("_" if key.collective in ("allreduce", "broadcast") else ""))

    def call(algorithm: str) -> None:
        answer = run(array, algorithm=algorithm)
        if not key.blocking:
            while not answer.done:
                time.sleep(_AWAY_S)
            answer.wait()

    return call


@dataclasses.dataclass(frozen=True)
class Times:
    """What came of timing several algorithms; the same on every rank.

    Attributes:
        medians_s: By algorithm the median over rounds of the time of the slowest rank.
        noise: By how much of the median half of the rounds differ from it; that of most algorithms.
        elapsed_s: How long all of it took.
    """

    medians_s: Mapping[str, float]
    noise: float
    elapsed_s: float


def interleaved_times(
    comm: Communicator, run: Callable[[str], None], algorithms: list[str], limit_s: float, rounds: tuple[int, int]
) -> Times:
    """Time algorithms one after the other in every round, so that disturbances hit all alike.

    Args:
        comm: Of the ranks; every one must call.
        run: Runs one algorithm once.
        algorithms: Their names.
        limit_s: No further round is begun after so long, or after twice as long if they are too few.
        rounds: The smallest and the largest number of rounds.
    """
    began_s = time.perf_counter()
    # The first time is for what is prepared once; the second tells how often to repeat.
    _time_all(comm, run, dict.fromkeys(algorithms, 1))
    first_s, elapsed_s = _agree(comm, _time_all(comm, run, dict.fromkeys(algorithms, 1)), began_s)
    repeats = {
        name: max(1, min(_MOST_REPEATS, int(_LEAST_S / max(seconds, 1e-9)))) for name, seconds in first_s.items()
    }
    least, most = rounds
    measured: list[Mapping[str, float]] = []
    while len(measured) < most and (
        elapsed_s < limit_s or not measured or (len(measured) < least and elapsed_s < _MOST_OVERTIME * limit_s)
    ):
        times_s, elapsed_s = _agree(comm, _time_all(comm, run, repeats), began_s)
        measured.append(times_s)
    medians_s = {name: statistics.median(times_s[name] for times_s in measured) for name in algorithms}
    deviations = (
        statistics.median(abs(times_s[name] / medians_s[name] - 1) for times_s in measured) for name in algorithms
    )
    return Times(medians_s, statistics.median(deviations), elapsed_s)


def _time_all(comm: Communicator, run: Callable[[str], None], repeats: Mapping[str, int]) -> dict[str, float]:
    times_s = {}
    for name, count in repeats.items():
        comm.barrier()
        begin_s = time.perf_counter()
        for _ in range(count):
            run(name)
        times_s[name] = (time.perf_counter() - begin_s) / count
    return times_s


def _agree(comm: Communicator, times_s: Mapping[str, float], began_s: float) -> tuple[dict[str, float], float]:
    """Return the times of the slowest rank, and how long it has been at it."""
    own = np.array([*times_s.values(), time.perf_counter() - began_s])
    slowest = comm.allreduce(own, op="max").tolist()
    return dict(zip(times_s, slowest[:-1], strict=True)), slowest[-1]
