from __future__ import annotations

import pytest

from mpitrain.training import Meter


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0
        self.waiting_s = 7.0

    def work(self, elapsed_s: float, waiting_s: float) -> None:
        self.now_s += elapsed_s
        self.waiting_s += waiting_s


def test_only_what_is_measured_counts() -> None:
    clock = Clock()
    meter = Meter(lambda: clock.waiting_s, lambda: clock.now_s)
    with meter.measure(32):
        clock.work(2.0, 0.5)
    clock.work(50.0, 40.0)
    with meter.measure(16):
        clock.work(4.0, 1.0)
    assert meter.samples == 48
    assert meter.elapsed_s == pytest.approx(6.0)
    assert meter.samples_per_s == pytest.approx(8.0)
    assert meter.communication_share == pytest.approx(0.25)


def test_work_that_fails_does_not_count() -> None:
    clock = Clock()
    meter = Meter(lambda: clock.waiting_s, lambda: clock.now_s)

    def fail() -> None:
        with meter.measure(5):
            clock.work(1.0, 1.0)
            raise OSError("lost")

    with pytest.raises(OSError, match="lost"):
        fail()
    assert (meter.samples, meter.elapsed_s, meter.communication_s) == (0, 0.0, 0.0)


def test_before_anything_is_measured_both_are_zero() -> None:
    assert Meter().samples_per_s == 0.0
    assert Meter().communication_share == 0.0
