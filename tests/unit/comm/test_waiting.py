from __future__ import annotations

import pytest

from mpitrain.comm import Backoff, waiting


@pytest.fixture
def naps(monkeypatch):
    """What would have been slept, yielded and how the clock went."""
    log = {"slept_s": [], "yields": 0, "now_s": 100.0}
    monkeypatch.setattr(waiting.time, "sleep", log["slept_s"].append)
    monkeypatch.setattr(waiting.time, "monotonic", lambda: log["now_s"])

    def count():
        log["yields"] += 1

    monkeypatch.setattr(waiting.os, "sched_yield", count)
    return log


def test_who_may_not_spin_yields_and_then_sleeps_longer_and_longer(naps):
    backoff = Backoff(spin=False)
    for _ in range(60):
        backoff.pause()
    assert naps["yields"] > 0
    slept_s = naps["slept_s"]
    assert len(slept_s) + naps["yields"] == 60
    assert slept_s == sorted(slept_s)
    assert slept_s[0] <= 50e-6
    # Not longer than what a message may be late without anybody noticing.
    assert slept_s[-1] == slept_s[-2] <= 1e-3


def test_who_may_spin_polls_at_first_and_sleeps_in_the_end(naps):
    backoff = Backoff(spin=True)
    for _ in range(10_000):
        backoff.pause()
    assert naps["slept_s"] == []
    naps["now_s"] += 1.0
    for _ in range(10_000):
        backoff.pause()
    assert len(naps["slept_s"]) > 0


def test_movement_begins_the_waiting_anew(naps):
    backoff = Backoff(spin=False)
    for _ in range(60):
        backoff.pause()
    naps["slept_s"].clear()
    yields = naps["yields"]
    backoff.reset()
    backoff.pause()
    assert naps["yields"] == yields + 1
    assert naps["slept_s"] == []
