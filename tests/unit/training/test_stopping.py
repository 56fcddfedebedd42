from __future__ import annotations

import os
import signal
import threading

import pytest

from mpitrain.collectives import Communicator
from mpitrain.training import StopRequest
from tests.support.ranks import run_communicators


def test_all_ranks_stop_after_the_same_step() -> None:
    def body(comm: Communicator) -> list[int]:
        stop = StopRequest(comm)
        answers = []
        for step in range(6):
            if step == 2 and comm.rank == 1:
                stop._on_signal(signal.SIGTERM, None)
            answers.append(stop.agreed_signal())
        stop.__exit__(None, None, None)
        return answers

    answers = run_communicators(3, body)
    assert answers == [[0, 0, 0, 15, 15, 15]] * 3


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_is_held_back_and_handlers_are_restored(number) -> None:
    if threading.current_thread() is not threading.main_thread():
        pytest.skip("signals come to the main thread only")
    before = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)}
    (communicator,) = run_communicators(1, lambda comm: comm)
    with StopRequest(communicator) as stop:
        assert signal.getsignal(number) != before[number]
        assert stop.agreed_signal() == 0
        os.kill(os.getpid(), number)
        assert stop.agreed_signal() == number
        # A second one has its usual effect.
        assert {each: signal.getsignal(each) for each in before} == before
    assert {each: signal.getsignal(each) for each in before} == before
