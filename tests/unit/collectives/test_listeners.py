"""Bound methods that are called as long as their objects live."""

from __future__ import annotations

import gc
import threading
import weakref

import numpy as np

from mpitrain.collectives.listeners import Listeners
from tests.support.ranks import run_communicators


class Listener:
    def __init__(self, heard):
        self._heard = heard

    def hear(self, *words):
        self._heard.append(words)


def test_they_are_called_in_their_order():
    heard = []
    living = [Listener(heard) for _ in range(3)]
    listeners = Listeners()
    for each in living:
        listeners.append(weakref.WeakMethod(each.hear))
    for number, function in enumerate(listeners):
        function(number)
    assert heard == [(0,), (1,), (2,)]


def test_the_dead_are_dropped_when_they_are_met():
    listeners = Listeners()
    living = [Listener([]) for _ in range(3)]
    for each in living:
        listeners.append(weakref.WeakMethod(each.hear))
    del living[1], each
    gc.collect()
    assert len(list(listeners)) == 2
    assert len(listeners) == 2


def test_the_dead_are_dropped_when_others_come():
    listeners = Listeners()
    for _ in range(20):
        listeners.append(weakref.WeakMethod(Listener([]).hear))
        gc.collect()
    assert len(listeners) <= 1


def test_threads_may_add_at_the_same_time():
    listeners = Listeners()
    living = [Listener([]) for _ in range(400)]

    def add(part):
        for each in part:
            listeners.append(weakref.WeakMethod(each.hear))
            assert list(listeners)

    threads = [threading.Thread(target=add, args=(living[first::4],)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(listeners) == 400


def test_a_communicator_forgets_those_that_are_gone():
    def body(comm):
        heard = []
        for _ in range(10):
            gone = Listener(heard)
            comm.before_leaving(gone.hear)
            comm.while_waiting(gone.hear)
            del gone
            gc.collect()
        kept = Listener(heard)
        comm.before_leaving(kept.hear)
        assert len(comm._watch.leave_functions) <= 2
        assert len(comm._watch.idle_functions) <= 1
        comm.allreduce(np.ones(3))
        comm.leave("has had enough")
        assert heard == [("has had enough",)]

    run_communicators(2, body)
