from __future__ import annotations

import itertools
import threading
import time

import pytest

from mpitrain.bench import stopwatch
from mpitrain.bench.stopwatch import Effort, Times, interleaved_times
from tests.support.ranks import run_communicators

pytestmark = pytest.mark.timeout(60)


def test_sides_take_turns_and_slowest_rank_counts(monkeypatch):
    # A clock by hand: on rank r a call of "a" takes 1 + r seconds, one of "b" 10.
    class Clock:
        def __init__(self, rank: int) -> None:
            self.now_s = 0.0
            self.order: list[str] = []
            self.costs_s = {"a": 1.0 + rank, "b": 10.0}

        def run(self, name: str) -> None:
            self.order.append(name)
            self.now_s += self.costs_s[name]

    clocks = {}

    def body(comm):
        clock = Clock(comm.rank)
        clocks[comm.rank] = clock
        sides = {name: lambda name=name: clock.run(name) for name in ("a", "b")}
        return interleaved_times(comm, sides, Effort((2, 3), limit_s=1e9)), clock.order

    ranks = threading.local()

    def perf_counter() -> float:
        return clocks[ranks.value].now_s if hasattr(ranks, "value") else 0.0

    monkeypatch.setattr(stopwatch.time, "perf_counter", perf_counter)

    def with_rank(comm):
        ranks.value = comm.rank
        return body(comm)

    results = run_communicators(3, with_rank)
    times, order = results[0]
    assert times.samples_s == {"a": (3.0, 3.0, 3.0), "b": (10.0, 10.0, 10.0)}
    assert times.repeats == {"a": 1, "b": 1}
    rounds = ["".join(order[begin : begin + 2]) for begin in range(0, 10, 2)]
    # Two that do not count, then each has an order of its own; the same on every rank.
    assert rounds[:2] == ["ab", "ab"]
    assert set(rounds[2:]) == {"ab", "ba"}
    assert all(result[1] == order for result in results)
    assert all(result[0] == times for result in results)


def test_short_operations_are_repeated_and_long_ones_are_not():
    def body(comm):
        return interleaved_times(comm, {"short": lambda: None, "long": lambda: time.sleep(0.002)}, Effort((1, 2), 10.0))

    first, second = run_communicators(2, body)
    assert first == second
    assert first.repeats == {"short": stopwatch._MOST_REPEATS, "long": 1}
    assert first.samples_s["long"][0] >= 0.002


def test_calls_before_each_sample_bring_data_back_to_the_caches_unless_there_is_more_than_they_hold():
    def body(comm):
        order = []
        sides = {"short": lambda: order.append("short"), "long": lambda: (order.append("long"), time.sleep(0.03))}
        repeats = interleaved_times(comm, sides, Effort((1, 1), 10.0)).repeats["short"]
        assert order.count("short") == 2 + max(stopwatch._MOST_WARMING, repeats // 2) + repeats
        assert order.count("long") == 2 + 1

    run_communicators(2, body)


@pytest.mark.parametrize(("rounds", "limit_s", "number"), [((2, 4), 1e-9, 1), ((1, 4), 1e-9, 1), ((2, 4), 100.0, 4)])
def test_time_limit_ends_the_rounds_but_not_before_the_first(rounds, limit_s, number):
    def body(comm):
        return interleaved_times(comm, {"side": lambda: None}, Effort(rounds, limit_s))

    for times in run_communicators(2, body):
        assert len(times.samples_s["side"]) == number


def test_medians_percentiles_and_noise_of_times_by_hand():
    times = Times({"a": (1.0, 2.0, 3.0, 4.0, 10.0), "b": (1.0, 1.0, 1.0, 1.0, 1.0)}, {"a": 1, "b": 1}, 1.0)
    assert times.medians_s == {"a": 3.0, "b": 1.0}
    assert times.percentile_s("a", 0) == 1.0
    assert times.percentile_s("a", 50) == 3.0
    assert times.percentile_s("a", 95) == pytest.approx(4 + 0.8 * 6)
    # Half of the samples of "a" differ by a third of the median; "b" by nothing; the median of two is between.
    assert times.noise == pytest.approx(sum((1 / 3, 0.0)) / 2)
    assert list(itertools.chain(times.repeats)) == ["a", "b"]
