from __future__ import annotations

import logging
import threading
import time

import numpy as np
import pytest

from mpitrain.collectives.calls import Calls
from mpitrain.config import Settings
from mpitrain.errors import (
    CollectiveMismatchError,
    CommError,
    CommRevokedError,
    CommTimeoutError,
    RankFailedError,
)
from tests.support.ranks import outcome, run_communicators

# Every failure must be everybody's within this time.
SOON_S = 10.0
UNCHECKED = Settings(wait="sleep", check=False)


def soon(size, body, **options):
    began_s = time.monotonic()
    results = run_communicators(size, lambda comm: outcome(lambda: body(comm)), timeout_s=SOON_S, **options)
    assert time.monotonic() - began_s < SOON_S
    return results


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
    results = soon(4, body, settings=settings, rendezvous=True)
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
    results = soon(3, lambda comm: comm.allreduce(np.arange(10.0), algorithm="ring"), settings=UNCHECKED)
    assert isinstance(results[1], MemoryError)
    assert all(isinstance(results[rank], CommRevokedError) for rank in (0, 2))


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, SystemExit])
def test_interrupted_call_makes_all_others_raise(interrupt, monkeypatch):
    # Rank 0 is interrupted while it sleeps between polls; the others must not wait for its part for ever.
    from mpitrain.collectives import progress

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
            return None
        time.sleep(0.05)
        return comm.allreduce(np.arange(10.0), algorithm="ring")

    results = soon(3, body, settings=UNCHECKED, rendezvous=True)
    assert [type(result) for result in results] == [type(None), CommRevokedError, CommRevokedError]


def test_revoked_communicator_refuses_every_further_call():
    def body(comm):
        if comm.rank == 1:
            comm.revoke("has had enough")
        error = outcome(comm.barrier)
        again = outcome(lambda: comm.allreduce_async(np.ones(3)))
        objects = outcome(lambda: comm.allgather_obj(1))
        return error, again, objects

    for result in soon(3, body):
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

    results = soon(3, body)
    assert all(isinstance(results[rank], CommRevokedError) for rank in (1, 2))


def test_other_communicators_survive_a_revoked_one():
    def body(comm):
        other = comm.duplicate()
        if comm.rank == 0:
            comm.revoke("test")
        assert isinstance(outcome(comm.barrier), CommRevokedError)
        return float(other.allreduce(np.array(1.0)))

    assert soon(3, body) == [3.0] * 3


def test_rank_that_leaves_is_named_by_those_who_need_it():
    def body(comm):
        comm.barrier()
        if comm.rank == 2:
            comm.leave("has finished")
            return None
        return comm.allreduce(np.ones(4))

    results = soon(3, body)
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

    for result in soon(4, body, settings=UNCHECKED):
        np.testing.assert_array_equal(result, np.arange(5.0))


@pytest.mark.parametrize("end", ["leave", "interrupt"])
def test_what_ends_in_a_later_operation_does_not_spoil_an_earlier_one(end, monkeypatch):
    # Rank 2 has done its part of the broadcast, and begun and given up the all-reduce, before rank 1 begins at all.
    begun = threading.Event()

    def body(comm):
        if comm.rank == 1:
            begun.wait(SOON_S)
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

    for array, error in soon(3, body, settings=UNCHECKED):
        np.testing.assert_array_equal(array, np.arange(5.0))
        assert isinstance(error, CommError)


def test_who_learns_of_a_departure_in_a_later_operation_completes_the_earlier_one():
    # Rank 2 has done its part of the reduction and leaves; rank 0 is told in the next operation, before rank 1 begins.
    has_learned = threading.Event()

    def body(comm):
        array = np.arange(5.0)
        if comm.rank == 1:
            has_learned.wait(SOON_S)
            return comm.reduce(array, root=0, algorithm="binomial")
        handle = comm.reduce_async(array, root=0, algorithm="binomial")
        if comm.rank == 2:
            handle.wait()
            comm.leave("has finished")
            return None
        assert isinstance(outcome(lambda: comm.allreduce(array, algorithm="ring")), RankFailedError)
        has_learned.set()
        return handle.wait()

    np.testing.assert_array_equal(soon(3, body, settings=UNCHECKED)[0], 3 * np.arange(5.0))


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

    results = soon(3, body, settings=UNCHECKED, rendezvous=True)
    assert all(isinstance(results[rank], CommError) for rank in (1, 2))


def test_rank_that_leaves_in_the_middle_of_an_operation_gives_the_communicator_up():
    def body(comm):
        if comm.rank == 0:
            comm.allreduce_async(np.ones(10))
            comm.leave("has failed with ValueError: test")
            return None
        time.sleep(0.05)
        first = outcome(lambda: comm.allreduce_async(np.ones(10)).wait(SOON_S))
        return first if isinstance(first, Exception) else outcome(comm.barrier)

    results = soon(3, body, rendezvous=True)
    for rank in (1, 2):
        assert isinstance(results[rank], (CommRevokedError, RankFailedError))
        assert "has failed with ValueError: test" in str(results[rank])


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("form", ["barrier", "barrier_async"])
def test_time_limit_ends_waiting_for_a_rank_that_does_not_come(form, check):
    settings = Settings(wait="sleep", check=check, timeout_s=0.2)

    def body(comm):
        if comm.rank == 0:
            time.sleep(0.8)
            # Too late: the others have given the communicator up meanwhile.
            return outcome(comm.barrier)
        answer = getattr(comm, form)()
        return answer.wait() if form.endswith("async") else answer

    results = soon(3, body, settings=settings)
    assert isinstance(results[0], CommRevokedError)
    errors = results[1:]
    assert any(isinstance(error, CommTimeoutError) for error in errors)
    assert all(isinstance(error, (CommTimeoutError, CommRevokedError)) for error in errors)
    assert any("barrier" in str(error) and "0.2 s" in str(error) for error in errors)


def test_time_limit_counts_from_the_last_movement_only():
    # Rank 0 is slow with every message, but never for as long as the limit.
    def body(comm):
        if comm.rank == 0:
            isend = comm.transport.isend

            def slow(*arguments):
                time.sleep(0.1)
                return isend(*arguments)

            comm.transport.isend = slow
        return float(comm.allreduce(np.ones(50), algorithm="ring")[0])

    settings = Settings(wait="sleep", check=False, timeout_s=0.4, segment_nbytes=40)
    assert soon(2, body, settings=settings) == [2.0, 2.0]


@pytest.mark.parametrize("late", [0, 1])
@pytest.mark.parametrize("form", ["allreduce", "allreduce_async"])
def test_stall_is_reported_once_with_the_place_of_the_late_rank_and_the_operation_goes_on(caplog, form, late):
    settings = Settings(wait="sleep", stall_warning_s=0.1, check=False)

    def linger():
        time.sleep(1.2)

    def body(comm):
        comm.barrier()
        if comm.rank == late:
            linger()
        result = getattr(comm, form)(np.ones(3), algorithm="ring")
        return float((result if form == "allreduce" else result.wait())[0])

    with caplog.at_level(logging.WARNING, logger="mpitrain"):
        assert soon(3, body, settings=settings) == [3.0] * 3
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith("r0/3 | allreduce sum of float64 [3] by ring: waits for other ranks since 0 s")
    assert f"arrived: ranks {', '.join(str(rank) for rank in range(3) if rank != late)}\n" in message
    assert f"missing: rank {late}, which has called 1 operations here, the latest barrier" in message
    assert "in linger" in message
    assert "no answer" not in message


def test_rank_that_does_not_answer_is_named(caplog, monkeypatch):
    from mpitrain.collectives import stall_reports

    monkeypatch.setattr(stall_reports, "_ANSWER_LIMIT_S", 0.3)
    settings = Settings(wait="sleep", stall_warning_s=0.1, check=False)

    def body(comm):
        comm.barrier()
        if comm.rank == 1:
            comm.engine.close()  # its progress thread ends: nothing of this rank looks for news any more
            time.sleep(1.5)
        return float(comm.allreduce(np.ones(3), algorithm="ring")[0])

    with caplog.at_level(logging.WARNING, logger="mpitrain"):
        assert soon(2, body, settings=settings) == [2.0, 2.0]
    (message,) = [record.getMessage() for record in caplog.records]
    assert "no answer: ranks 1" in message


def test_failed_operation_does_not_stop_one_on_another_communicator():
    def body(comm):
        other = comm.duplicate()
        bad = comm.allreduce_async(np.ones(5 + comm.rank))
        good = other.allreduce_async(np.ones(5))
        assert isinstance(outcome(bad.wait), CollectiveMismatchError)
        return good.wait().tolist()

    assert soon(3, body) == [[3.0] * 5] * 3


def test_messages_of_different_length_are_noticed_without_the_check():
    def body(comm):
        return comm.allreduce(np.ones(8 if comm.rank else 4), algorithm="recursive_doubling")

    results = soon(2, body, settings=UNCHECKED)
    assert any(isinstance(result, CollectiveMismatchError) for result in results)
    assert all(isinstance(result, (CollectiveMismatchError, CommRevokedError)) for result in results)


def test_news_may_arrive_while_another_thread_reads_it():
    # Operations on several threads look for news at the same time; what they share must not break.
    from mpitrain.collectives.peers import PeerWatch

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
