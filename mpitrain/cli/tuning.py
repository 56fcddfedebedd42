"""Measures all algorithms of a group and makes a table of the fastest ones."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence

from mpitrain.bench import stopwatch
from mpitrain.bench.operation import IN_PLACE, Operation, Use
from mpitrain.bench.stopwatch import Times, interleaved_times
from mpitrain.collectives import Communicator
from mpitrain.collectives.table import Key, Shape, Steps
from mpitrain.errors import UnavailableError

__all__ = ["COLLECTIVES", "Effort", "Measurement", "keys_of", "measure", "steps_of"]

COLLECTIVES = ("allreduce", "broadcast", "allgather", "reduce_scatter")

# Where all algorithms are limited by bandwidth: their ratios change little from here, so what leads at the largest
# size that was measured leads at all above, and who lags behind more and more will not catch up.
_SETTLED_NBYTES = 256 << 10
_UNBOUNDED_NBYTES = 16 << 20
_HOPELESS = 3.0
# A lead by less is none.
_LEAST_LEAD = 0.05
# What an algorithm must gain, over all sizes at which it is taken, to be worth a step; or the noise, if that is more.
_STEP_GAIN = 0.1
# What a size costs beside its bytes, as a number of bytes.
_SIZE_COST_NBYTES = 2 << 20


@dataclasses.dataclass(frozen=True)
class Effort:
    """How thoroughly to measure.

    Attributes:
        factor: From one size to the next.
        passes: How often all sizes are measured; what disturbs the machine for a while does not do so in all passes.
        rounds: The smallest and the largest number of rounds at each size and in each pass.
    """

    factor: int
    passes: int
    rounds: tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One size of one combination.

    Attributes:
        key: The combination.
        nbytes: The size.
        times_s: By algorithm, of its best pass; one that was hopeless before is missing.
        noise: By how much of it a time typically differs from round to round or from pass to pass, if that is more.
    """

    key: Key
    nbytes: int
    times_s: Mapping[str, float]
    noise: float = 0.0


def keys_of(comm: Communicator, collectives: Sequence[str]) -> list[Key]:
    """Return the combinations to measure."""
    shape = Shape.of(comm.topology)
    keys = [Key(each, shape, blocking) for each in collectives for blocking in (True, False)]
    if "allreduce" in collectives and shape.largest > 1 and comm.settings.shared_memory:
        keys += [Key("allreduce", shape, blocking, in_window=True) for blocking in (True, False)]
    return keys


def measure(
    comm: Communicator,
    keys: Sequence[Key],
    sizes: list[int],
    effort: Effort,
    *,
    limit_s: float,
    on_item: Callable[[Key, int], None] = lambda _key, _nbytes: None,
) -> Iterator[Measurement]:
    """Measure every combination at every size; every rank must exhaust it.

    Stops early, with the same measurement on all ranks, when the time is over.

    Args:
        comm: Of the ranks; without checks of arguments, as they would add to every time.
        keys: The combinations.
        sizes: Ascending.
        effort: How thoroughly.
        limit_s: About how long in all.
        on_item: Called before each measurement.
    """
    left = _Budget(limit_s, sizes * (len(keys) * effort.passes))
    for key in keys:
        measured: dict[int, list[Times]] = {}
        for _ in range(effort.passes):
            field = _Field([name for name in comm.known_algorithms(key.collective) if name != "auto"])
            for nbytes in sizes:
                if left.is_spent:
                    break
                on_item(key, nbytes)
                share_s = left.share_s(nbytes)
                # The last one's memory is given back before this one's is taken.
                operation = sides = None
                try:
                    operation = Operation(comm, _use_of(key), nbytes)
                except UnavailableError:
                    continue
                sides = {name: operation.call(name) for name in field.algorithms}
                times = interleaved_times(comm, sides, stopwatch.Effort(effort.rounds, share_s))
                left.spend(times.elapsed_s)
                measured.setdefault(nbytes, []).append(times)
                field.drop_hopeless(nbytes, times.medians_s)
        for nbytes, passes in measured.items():
            yield _best_of(key, nbytes, passes)


def _use_of(key: Key) -> Use:
    return Use(
        key.collective,
        memory="window" if key.in_window else "host",
        in_place=key.collective in IN_PLACE,
        blocking=key.blocking,
    )


class _Budget:
    """Divides the time among what is still to be measured."""

    def __init__(self, limit_s: float, sizes: Sequence[int]) -> None:
        self._left_s = limit_s
        self._left_nbytes = sum(sizes) + _SIZE_COST_NBYTES * len(sizes)

    @property
    def is_spent(self) -> bool:
        return self._left_s <= 0

    def share_s(self, nbytes: int) -> float:
        cost_nbytes = nbytes + _SIZE_COST_NBYTES
        share_s = self._left_s * cost_nbytes / self._left_nbytes
        self._left_nbytes -= cost_nbytes
        return share_s

    def spend(self, seconds: float) -> None:
        self._left_s -= seconds


def _best_of(key: Key, nbytes: int, passes: Sequence[Times]) -> Measurement:
    by_name: dict[str, list[float]] = {}
    for times in passes:
        for name, seconds in times.medians_s.items():
            by_name.setdefault(name, []).append(seconds)
    spread = statistics.median(max(each) / min(each) - 1 for each in by_name.values())
    within = statistics.median(times.noise for times in passes)
    return Measurement(key, nbytes, {name: min(each) for name, each in by_name.items()}, max(spread, within))


class _Field:
    """The algorithms that are still in the race."""

    def __init__(self, algorithms: list[str]) -> None:
        self.algorithms = algorithms
        self._lags: dict[str, float] = {}

    def drop_hopeless(self, nbytes: int, times_s: Mapping[str, float]) -> None:
        """Drop those that are far behind at two sizes, and further at the larger one.

        Where latency decides nobody is dropped: who is last there may be first at the other end.
        """
        best_s = min(times_s.values())
        for name, seconds in times_s.items():
            lag = seconds / best_s
            before = self._lags.get(name, 0.0)
            self._lags[name] = lag
            if nbytes >= _SETTLED_NBYTES and lag >= before >= _HOPELESS:
                self.algorithms.remove(name)


def steps_of(measurements: Sequence[Measurement]) -> Steps:
    """Return the fastest algorithms, of measurements of one combination at ascending sizes.

    Of all sequences of algorithms it is the one that loses least to the fastest at each size, where each change
    counts as a loss as well; so neither a small lead nor a single disturbed size makes a step. Between two sizes
    with different algorithms the limit is their geometric mean. Above the largest size nothing is known, unless
    that is one at which ratios have settled.
    """
    taken = _cheapest_sequence(measurements)
    steps: list[tuple[int | None, str]] = []
    for index in range(1, len(taken)):
        if taken[index] != taken[index - 1]:
            limit = math.isqrt(measurements[index - 1].nbytes * measurements[index].nbytes)
            steps.append((limit, taken[index - 1]))
    largest = measurements[-1].nbytes
    return (*steps, (None if largest >= _UNBOUNDED_NBYTES else largest, taken[-1]))


def _cheapest_sequence(measurements: Sequence[Measurement]) -> list[str]:
    """Return an algorithm for each size."""
    step_loss = math.log1p(max(_STEP_GAIN, statistics.median(each.noise for each in measurements)))
    # By the algorithm at the current size: the least loss so far, and how it comes about.
    best: dict[str, tuple[float, list[str]]] = {"": (-step_loss, [])}
    for each in measurements:
        fastest_s = min(each.times_s.values())
        cheapest = min(best.values(), key=lambda path: path[0])
        extended: dict[str, tuple[float, list[str]]] = {}
        for name, seconds in each.times_s.items():
            loss, path = min(
                (best.get(name, (math.inf, [])), (cheapest[0] + step_loss, cheapest[1])), key=lambda path: path[0]
            )
            lag = math.log(seconds / fastest_s)
            extended[name] = (loss + (lag if lag > math.log1p(_LEAST_LEAD) else 0.0), [*path, name])
        best = extended
    return min(best.values(), key=lambda path: path[0])[1]
