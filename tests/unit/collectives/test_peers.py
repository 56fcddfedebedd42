from __future__ import annotations

import logging
import re
import threading
import time

import numpy as np
import pytest

from mpitrain.collectives import peers, stall_reports
from mpitrain.collectives.calls import Calls
from mpitrain.collectives.peers import PeerWatch
from mpitrain.collectives.progress import drive
from mpitrain.config import Settings
from mpitrain.errors import (
    CollectiveMismatchError,
    CommError,
    CommRevokedError,
    CommTimeoutError,
    RankFailedError,
)
from tests.support.limits import HANG_S
from tests.support.ranks import outcome, run_communicators

UNCHECKED = Settings(wait="sleep", check=False)


def outcomes(size, body, **options):
    """Return what becomes of `body` on each rank; every failure must be everybody's, so that all come to an end."""
    return run_communicators(size, lambda comm: outcome(lambda: body(comm)), **options)


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("form", ["allreduce_", "allreduce_async_"])
@pytest.mark.parametrize("algorithm", ["ring", "recursive_doubling", "double_tree"])
def test_rank_whose_messages_fail_makes_all_others_raise(algorithm, form, check):
    def body(comm):
        array = np.arange(1000.0)
        if comm.rank == 2:
            sends = []
            isend = comm.transport.isend

            def failing(*arguments):
                sends.append(arguments)
                if len(sends) > 3:
                    raise CommError("send: the cable was cut")
                return isend(*arguments)

            comm.transport.isend = failing
        answer = [getattr(comm, form)(array, algorithm=algorithm) for _ in range(5)]
        return [handle.wait() for handle in answer] if "async" in form else answer

    settings = Settings(wait="sleep", check=check, segment_nbytes=800)
    results = outcomes(4, body, settings=settings, rendezvous=True)
    assert isinstance(results[2], CommError)
    assert "cable" in str(results[2])
    for rank in (0, 1, 3):
        assert isinstance(results[rank], CommRevokedError)
        assert "rank 2" in str(results[rank])
        assert "cable" in str(results[rank])


def test_error_of_any_kind_inside_an_operation_makes_all_others_raise(monkeypatch):
    from mpitrain.collectives import executor

    reduce_into = executor.reduce_into

    def broken(*arguments):
        if threading.current_thread().name == "rank 1":
            raise MemoryError("no room")
        reduce_into(*arguments)

    monkeypatch.setattr(executor, "reduce_into", broken)
    results = outcomes(3, lambda comm: comm.allreduce(np.arange(10.0), algorithm="ring"), settings=UNCHECKED)
    assert isinstance(results[1], MemoryError)
    assert all(isinstance(results[rank], CommRevokedError) for rank in (0, 2))


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, SystemExit])
def test_interrupted_call_makes_all_others_raise(interrupt, monkeypatch):
    # Rank 0 is interrupted while it sleeps between polls; the others must not wait for its part for ever.
    from mpitrain.collectives import progress

    is_interrupted = threading.Event()

    class Backoff(progress.Backoff):
        def pause(self):
            if threading.current_thread().name == "rank 0":
                raise interrupt
            super().pause()

    monkeypatch.setattr(progress, "Backoff", Backoff)

    kept = []

    def body(comm):
        if comm.rank == 0:
            with pytest.raises(interrupt) as caught:
                comm.allreduce(np.arange(10.0), algorithm="ring")
            kept.append(caught)  # with all that the traceback refers to
            is_interrupted.set()
            return None
        is_interrupted.wait(HANG_S)
        return comm.allreduce(np.arange(10.0), algorithm="ring")

    results = outcomes(3, body, settings=UNCHECKED, rendezvous=True)
    assert [type(result) for result in results] == [type(None), CommRevokedError, CommRevokedError]


def test_revoked_communicator_refuses_every_further_call():
    def body(comm):
        if comm.rank == 1:
            comm.revoke("has had enough")
        error = outcome(comm.barrier)
        again = outcome(lambda: comm.allreduce_async(np.ones(3)))
        objects = outcome(lambda: comm.allgather_obj(1))
        return error, again, objects

    for result in outcomes(3, body):
        for error in result:
            assert isinstance(error, CommRevokedError)
            assert "rank 1: has had enough" in str(error)
            assert "make a new one" in str(error)


def test_revoke_ends_operations_in_flight():
    def body(comm):
        if comm.rank == 0:
            time.sleep(0.1)
            comm.revoke("changed its mind")
            return None
        return comm.allreduce_async(np.ones(10)).wait()

    results = outcomes(3, body)
    assert all(isinstance(results[rank], CommRevokedError) for rank in (1, 2))


def test_other_communicators_survive_a_revoked_one():
    def body(comm):
        other = comm.duplicate()
        if comm.rank == 0:
            comm.revoke("test")
        assert isinstance(outcome(comm.barrier), CommRevokedError)
        return float(other.allreduce(np.array(1.0)))

    assert outcomes(3, body) == [3.0] * 3


def test_rank_that_leaves_is_named_by_those_who_need_it():
    def body(comm):
        comm.barrier()
        if comm.rank == 2:
            comm.leave("has finished")
            return None
        return comm.allreduce(np.ones(4))

    results = outcomes(3, body)
    for rank in (0, 1):
        assert isinstance(results[rank], (RankFailedError, CommRevokedError))
        assert "rank 2 has finished" in str(results[rank])
    assert any(isinstance(result, RankFailedError) for result in results)


def test_rank_that_leaves_after_its_part_does_not_spoil_the_operation():
    # Rank 0 has sent all it has to send, eagerly, and leaves while the others are not even there.
    def body(comm):
        if comm.rank == 0:
            comm.broadcast(np.arange(5.0), root=0, algorithm="binomial")
            comm.leave("has finished")
            return np.arange(5.0)
        time.sleep(0.1)
        return comm.broadcast(np.zeros(5), root=0, algorithm="binomial")

    for result in outcomes(4, body, settings=UNCHECKED):
        np.testing.assert_array_equal(result, np.arange(5.0))


@pytest.mark.parametrize("end", ["leave", "interrupt"])
def test_what_ends_in_a_later_operation_does_not_spoil_an_earlier_one(end, monkeypatch):
    # Rank 2 has done its part of the broadcast, and begun and given up the all-reduce, before rank 1 begins at all.
    begun = threading.Event()

    def body(comm):
        if comm.rank == 1:
            begun.wait(HANG_S)
            comm._watch.read_news()  # as whoever waits does
            array = comm.broadcast(np.zeros(5), root=2, algorithm="binomial")
            return array, outcome(lambda: comm.allreduce(array, algorithm="ring"))
        array = comm.broadcast(np.arange(5.0), root=2, algorithm="binomial")
        if comm.rank == 0:
            return array, outcome(lambda: comm.allreduce(array, algorithm="ring"))
        handle = comm.allreduce_async(array, algorithm="ring")
        if end == "leave":
            comm.leave("has gone fishing")
        else:
            monkeypatch.setattr(comm.transport, "test_some", interrupted)
            outcome(handle.wait)
        begun.set()
        return array, outcome(lambda: comm.allreduce(array, algorithm="ring"))

    def interrupted(_requests):
        raise MemoryError("no room")

    for array, error in outcomes(3, body, settings=UNCHECKED):
        np.testing.assert_array_equal(array, np.arange(5.0))
        assert isinstance(error, CommError)


def test_who_learns_of_a_departure_in_a_later_operation_completes_the_earlier_one():
    # Rank 2 has done its part of the reduction and leaves; rank 0 is told in the next operation, before rank 1 begins.
    has_learned = threading.Event()

    def body(comm):
        array = np.arange(5.0)
        if comm.rank == 1:
            has_learned.wait(HANG_S)
            return comm.reduce(array, root=0, algorithm="binomial")
        handle = comm.reduce_async(array, root=0, algorithm="binomial")
        if comm.rank == 2:
            handle.wait()
            comm.leave("has finished")
            return None
        assert isinstance(outcome(lambda: comm.allreduce(array, algorithm="ring")), RankFailedError)
        has_learned.set()
        return handle.wait()

    np.testing.assert_array_equal(outcomes(3, body, settings=UNCHECKED)[0], 3 * np.arange(5.0))


def test_what_a_rank_has_given_up_it_does_not_take_up_again():
    def body(comm):
        if comm.rank == 0:
            comm.allreduce_async(np.ones(10), algorithm="ring")
            comm.leave("has shut down")
            comm._calls.end(0)  # ended without a result, as the progress thread does
            comm.leave("has finished")
            return None
        time.sleep(0.1)
        comm._watch.read_news()
        return outcome(lambda: comm.allreduce(np.ones(10), algorithm="ring"))

    results = outcomes(3, body, settings=UNCHECKED, rendezvous=True)
    assert all(isinstance(results[rank], CommError) for rank in (1, 2))


def test_rank_that_leaves_in_the_middle_of_an_operation_gives_the_communicator_up():
    def body(comm):
        if comm.rank == 0:
            comm.allreduce_async(np.ones(10))
            comm.leave("has failed with ValueError: test")
            return None
        time.sleep(0.05)
        first = outcome(lambda: comm.allreduce_async(np.ones(10)).wait(HANG_S))
        return first if isinstance(first, Exception) else outcome(comm.barrier)

    results = outcomes(3, body, rendezvous=True)
    for rank in (1, 2):
        assert isinstance(results[rank], (CommRevokedError, RankFailedError))
        assert "has failed with ValueError: test" in str(results[rank])


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("form", ["barrier", "barrier_async"])
def test_time_limit_ends_waiting_for_a_rank_that_does_not_come(form, check):
    settings = Settings(wait="sleep", check=check, timeout_s=0.2)
    have_failed = threading.Barrier(3)

    def call(comm):
        answer = getattr(comm, form)()
        return answer.wait() if form.endswith("async") else answer

    def body(comm):
        error = None if comm.rank == 0 else outcome(lambda: call(comm))
        have_failed.wait(HANG_S)
        # Too late: the others have given the communicator up meanwhile.
        return error or outcome(lambda: call(comm))

    results = outcomes(3, body, settings=settings)
    assert isinstance(results[0], CommRevokedError)
    errors = results[1:]
    assert any(isinstance(error, CommTimeoutError) for error in errors)
    assert all(isinstance(error, (CommTimeoutError, CommRevokedError)) for error in errors)
    assert any("barrier" in str(error) and "0.2 s" in str(error) for error in errors)


def test_time_limit_counts_from_the_last_movement_only(monkeypatch):
    class Alone:
        rank, size = 0, 2

        def notices(self):
            return []

        def notify(self, dest, notice):
            pass

    now_s = [100.0]
    monkeypatch.setattr(peers.time, "monotonic", lambda: now_s[0])

    def slow(pauses_s):
        # Each message is slow, and announces itself by nothing.
        for pause_s in pauses_s:
            for _ in range(3):
                yield False
                now_s[0] += pause_s / 3
            yield True
        return "all has come"

    def run(pauses_s):
        watch = PeerWatch(Alone(), UNCHECKED.replace(timeout_s=0.4), Calls())
        return drive(watch.guard(slow(pauses_s), "slow", 0), spin=False)

    assert run([0.39] * 5) == "all has come"
    with pytest.raises(CommTimeoutError, match=r"rank 0/2, slow: nothing moved for 0\.4 s, the limit is 0\.4 s"):
        run([0.39, 0.39, 0.64])


class Linger:
    """What a late rank does: it lets the others warn once they have come, and goes on when that has been reported.

    However slow the machine is, nobody warns before.
    """

    def __init__(self, size, caplog):
        self.settings = Settings(wait="sleep", check=False, stall_warning_s=0.0)
        self.comms = [None] * size
        self._caplog = caplog

    def linger(self, own):
        others = [comm for comm in self.comms if comm is not own]
        begun = own._calls.number
        wait_until(lambda: all(comm._calls.number > begun for comm in others))
        for comm in others:
            comm._watch._settings = self.settings.replace(stall_warning_s=0.01)
        wait_until(lambda: self._caplog.records)


def wait_until(is_so):
    deadline_s = time.monotonic() + HANG_S
    while not is_so():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


@pytest.mark.parametrize("late", [0, 1])
@pytest.mark.parametrize("form", ["allreduce", "allreduce_async"])
def test_stall_is_reported_once_with_the_place_of_the_late_rank_and_the_operation_goes_on(
    caplog, monkeypatch, form, late
):
    monkeypatch.setattr(stall_reports, "_ANSWER_LIMIT_S", HANG_S)
    late_one = Linger(3, caplog)

    def body(comm):
        late_one.comms[comm.rank] = comm
        comm.barrier()
        if comm.rank == late:
            late_one.linger(comm)
        result = getattr(comm, form)(np.ones(3), algorithm="ring")
        return float((result if form == "allreduce" else result.wait())[0])

    with caplog.at_level(logging.WARNING, logger="mpitrain"):
        assert outcomes(3, body, settings=late_one.settings) == [3.0] * 3
    (message,) = [record.getMessage() for record in caplog.records]
    assert re.match(r"r0/3 \| allreduce sum of float64 \[3\] by ring: waits for other ranks since \d+ s", message)
    assert f"arrived: ranks {', '.join(str(rank) for rank in range(3) if rank != late)}\n" in message
    assert f"missing: rank {late}, which has called 1 operations here, the latest barrier" in message
    assert "in linger" in message
    assert "no answer" not in message


def test_rank_that_does_not_answer_is_named(caplog, monkeypatch):
    monkeypatch.setattr(stall_reports, "_ANSWER_LIMIT_S", 0.3)
    late_one = Linger(2, caplog)

    def body(comm):
        late_one.comms[comm.rank] = comm
        comm.barrier()
        if comm.rank == 1:
            comm.engine.close()  # its progress thread ends: nothing of this rank looks for news any more
            late_one.linger(comm)
        return float(comm.allreduce(np.ones(3), algorithm="ring")[0])

    with caplog.at_level(logging.WARNING, logger="mpitrain"):
        assert outcomes(2, body, settings=late_one.settings) == [2.0, 2.0]
    (message,) = [record.getMessage() for record in caplog.records]
    assert "no answer: ranks 1" in message


def test_failed_operation_does_not_stop_one_on_another_communicator():
    def body(comm):
        other = comm.duplicate()
        bad = comm.allreduce_async(np.ones(5 + comm.rank))
        good = other.allreduce_async(np.ones(5))
        assert isinstance(outcome(bad.wait), CollectiveMismatchError)
        return good.wait().tolist()

    assert outcomes(3, body) == [[3.0] * 5] * 3


def test_messages_of_different_length_are_noticed_without_the_check():
    def body(comm):
        return comm.allreduce(np.ones(8 if comm.rank else 4), algorithm="recursive_doubling")

    results = outcomes(2, body, settings=UNCHECKED)
    assert any(isinstance(result, CollectiveMismatchError) for result in results)
    assert all(isinstance(result, (CollectiveMismatchError, CommRevokedError)) for result in results)


def test_news_may_arrive_while_another_thread_reads_it():
    # Operations on several threads look for news at the same time; what they share must not break.
    class Transport:
        rank, size = 0, 5000

        def __init__(self):
            self.next = 1

        def notices(self):
            source = self.next
            self.next += 1
            return [(source, b"left 9 has finished")]

    watch = PeerWatch(Transport(), Settings(), Calls())
    errors = []

    def look():
        for _ in range(1000):
            try:
                watch._look(0.0, "test", 0)
            except Exception as error:
                errors.append(error)
                return

    threads = [threading.Thread(target=look) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
