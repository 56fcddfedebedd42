from __future__ import annotations

import itertools
import threading
from collections.abc import Callable

import pytest

from mpitrain.bench import stopwatch
from mpitrain.bench.stopwatch import Effort, Times, interleaved_times
from tests.support.ranks import run_communicators


class Clock:
    """A clock by hand in each rank's thread: calls take as long as is said here, and all else takes no time."""

    def __init__(self) -> None:
        self._own = threading.local()

    def perf_counter(self) -> float:
        return getattr(self._own, "now_s", 0.0)

    def side(self, name: str, cost_s: float, order: list[str]) -> Callable[[], None]:
        """Return what takes so long on this rank, and notes that it was called."""

        def run() -> None:
            order.append(name)
            self._own.now_s = self.perf_counter() + cost_s

        return run


@pytest.fixture
def clock(monkeypatch):
    by_hand = Clock()
    monkeypatch.setattr(stopwatch, "time", by_hand)
    return by_hand


def test_sides_take_turns_and_slowest_rank_counts(clock):
    def body(comm):
        order = []
        sides = {"a": clock.side("a", 1.0 + comm.rank, order), "b": clock.side("b", 10.0, order)}
        return interleaved_times(comm, sides, Effort((2, 3), limit_s=1e9)), order

    results = run_communicators(3, body)
    times, order = results[0]
    assert times.samples_s == {"a": (3.0, 3.0, 3.0), "b": (10.0, 10.0, 10.0)}
    assert times.repeats == {"a": 1, "b": 1}
    rounds = ["".join(order[begin : begin + 2]) for begin in range(0, 10, 2)]
    # Two that do not count, then each has an order of its own; the same on every rank.
    assert rounds[:2] == ["ab", "ab"]
    assert set(rounds[2:]) == {"ab", "ba"}
    assert all(result[1] == order for result in results)
    assert all(result[0] == times for result in results)


# By powers of two, which a sum of many has exactly.
@pytest.mark.parametrize(
    ("cost_s", "repeats"),
    [(0.0, stopwatch._MOST_REPEATS), (2.0**-20, stopwatch._MOST_REPEATS), (2.0**-14, 16), (2.0**-10, 1), (2.0, 1)],
)
def test_short_operations_are_repeated_and_long_ones_are_not(clock, cost_s, repeats):
    def body(comm):
        # The slowest rank decides for all.
        cost_here_s = cost_s if comm.rank == 1 else cost_s / 4
        sides = {"side": clock.side("side", cost_here_s, []), "long": clock.side("long", 0.5, [])}
        return interleaved_times(comm, sides, Effort((1, 2), 10.0))

    first, second = run_communicators(2, body)
    assert first == second
    assert first.repeats == {"side": repeats, "long": 1}
    # However often it was repeated, a sample is the time of one call.
    assert first.samples_s == {"side": (cost_s,) * 2, "long": (0.5,) * 2}


@pytest.mark.parametrize(
    ("cost_s", "warming"),
    [
        # Half as many as are timed, 8 at least, and no more than fill the time.
        (0.0, stopwatch._MOST_REPEATS // 2),
        (2.0**-14, stopwatch._MOST_WARMING),
        (2.0**-10, 6),
        (2.0**-6, 1),
        # More data than caches hold.
        (2.0**-5, 0),
    ],
)
def test_calls_before_each_sample_bring_data_back_to_the_caches_unless_there_is_more_than_they_hold(
    clock, cost_s, warming
):
    def body(comm):
        order = []
        sides = {"side": clock.side("side", cost_s, order), "other": clock.side("other", 0.5, order)}
        repeats = interleaved_times(comm, sides, Effort((1, 1), 10.0)).repeats["side"]
        assert order.count("side") == 2 + warming + repeats
        assert order.count("other") == 2 + 1

    run_communicators(2, body)


# A round takes 1 s; the two that do not count come first.
@pytest.mark.parametrize(
    ("rounds", "limit_s", "number"),
    [
        ((1, 9), 1.0, 1),
        # Too few may take twice as long.
        ((4, 9), 1.0, 1),
        ((4, 9), 2.0, 2),
        ((4, 9), 2.5, 3),
        ((4, 9), 5.5, 4),
        ((4, 9), 7.5, 6),
        ((4, 9), 100.0, 9),
    ],
)
def test_time_limit_ends_the_rounds_but_not_before_the_first(clock, rounds, limit_s, number):
    def body(comm):
        return interleaved_times(comm, {"side": clock.side("side", 1.0, [])}, Effort(rounds, limit_s))

    for times in run_communicators(2, body):
        assert len(times.samples_s["side"]) == number
        assert times.elapsed_s == 2 + number


def test_medians_percentiles_and_noise_of_times_by_hand():
    times = Times({"a": (1.0, 2.0, 3.0, 4.0, 10.0), "b": (1.0, 1.0, 1.0, 1.0, 1.0)}, {"a": 1, "b": 1}, 1.0)
    assert times.medians_s == {"a": 3.0, "b": 1.0}
    assert times.percentile_s("a", 0) == 1.0
    assert times.percentile_s("a", 50) == 3.0
    assert times.percentile_s("a", 95) == pytest.approx(4 + 0.8 * 6)
    # Half of the samples of "a" differ by a third of the median; "b" by nothing; the median of two is between.
    assert times.noise == pytest.approx(sum((1 / 3, 0.0)) / 2)
    assert list(itertools.chain(times.repeats)) == ["a", "b"]
