from __future__ import annotations

import gc
import threading
import time
import types
import weakref

import pytest

from mpitrain.collectives import ProgressEngine
from mpitrain.collectives.progress import drive
from mpitrain.errors import CommError, CommTimeoutError
from mpitrain.observe import counters
from tests.support.limits import HANG_S


def steps(*moves, result=None):
    """A task that yields the given moves."""
    yield from moves
    return result


def until(event, result=None):
    """A task that ends when the event is set."""
    while not event.is_set():
        yield False
    return result


def failing(error, after=1):
    for _ in range(after):
        yield True
    raise error


@pytest.fixture
def engine():
    engine = ProgressEngine()
    yield engine
    engine.close()


def wait_until(condition):
    deadline_s = time.monotonic() + HANG_S
    while not condition():
        assert time.monotonic() < deadline_s, "condition was not met in time"
        time.sleep(0.001)


@pytest.mark.parametrize("spin", [True, False])
def test_drive_returns_the_result(spin):
    assert drive(steps(False, True, False, result=7), spin=spin) == 7


def test_drive_raises_what_the_task_raises():
    with pytest.raises(CommError, match="broken"):
        drive(failing(CommError("broken")), spin=False)


def test_task_that_ends_at_once_needs_no_thread(engine):
    handle = engine.start(steps(result=3))
    assert handle.done
    assert handle.wait() == 3
    assert engine._thread._thread is None


def test_first_step_runs_in_the_caller(engine):
    threads = []

    def task():
        threads.append(threading.current_thread())
        yield True

    engine.start(task()).wait()
    assert threads == [threading.current_thread()]


def test_background_thread_finishes_what_nobody_waits_for(engine):
    handle = engine.start(steps(*[False] * 50, True, result="done"))
    wait_until(lambda: handle.done)
    assert handle.wait() == "done"


def test_waiting_thread_advances_other_operations_too(engine):
    first = threading.Event()

    def second():
        yield True
        first.set()

    handle = engine.start(until(first))
    engine.start(second())
    handle.wait(HANG_S)


def test_stalled_operation_does_not_stop_others(engine):
    never = threading.Event()
    stalled = engine.start(until(never))
    for number in range(20):
        assert engine.start(steps(False, True, False, result=number)).wait(HANG_S) == number
    assert not stalled.done
    never.set()
    stalled.wait(HANG_S)


def test_failed_operation_does_not_stop_others(engine):
    bad = engine.start(failing(CommError("broken"), after=3))
    good = engine.start(steps(*[False] * 10, result=1))
    assert good.wait(HANG_S) == 1
    for _ in range(2):
        with pytest.raises(CommError, match="broken"):
            bad.wait(HANG_S)


def test_error_in_the_first_step_is_for_the_handle(engine):
    handle = engine.start(failing(CommError("at once"), after=0))
    assert handle.done
    with pytest.raises(CommError, match="at once"):
        handle.wait()


def test_wait_with_a_time_limit_leaves_the_operation_in_flight(engine):
    event = threading.Event()
    handle = engine.start(until(event, "late"), "allreduce of something")
    began_s = time.monotonic()
    with pytest.raises(CommTimeoutError, match=r"allreduce of something: .*0\.05 s"):
        handle.wait(0.05)
    assert time.monotonic() - began_s >= 0.05
    assert not handle.done
    event.set()
    assert handle.wait(HANG_S) == "late"


def test_wait_with_no_time_at_all_is_a_question(engine):
    event = threading.Event()
    handle = engine.start(until(event))
    with pytest.raises(CommTimeoutError):
        handle.wait(0)
    event.set()


def test_many_threads_may_wait_for_the_same_operation(engine):
    event = threading.Event()
    handle = engine.start(until(event, 5))
    results = []
    threads = [threading.Thread(target=lambda: results.append(handle.wait(HANG_S))) for _ in range(6)]
    for thread in threads:
        thread.start()
    time.sleep(0.02)
    event.set()
    for thread in threads:
        thread.join(HANG_S)
    assert results == [5] * 6


def test_a_task_is_never_advanced_by_two_threads_at_once(engine):
    inside = threading.Lock()
    overlaps = []

    def task():
        for _ in range(200):
            if not inside.acquire(blocking=False):
                overlaps.append(threading.current_thread().name)
            time.sleep(0)
            inside.release()
            yield True

    handle = engine.start(task())
    threads = [threading.Thread(target=handle.wait, args=(HANG_S,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(HANG_S)
    assert handle.done
    assert overlaps == []


def test_operations_started_and_awaited_by_many_threads(engine):
    # Every hand-over between waiting threads and the background thread; a lost wake-up would be a hang.
    failures = []

    def work(seed):
        for turn in range(100):
            handle = engine.start(steps(*[False] * ((seed + turn) % 7), result=turn))
            if turn % 3 == 0:
                time.sleep(0.0005 * (seed % 3))
            if handle.wait(HANG_S) != turn:
                failures.append((seed, turn))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(HANG_S)
    assert failures == []
    assert engine._active == []


def comes_to_take_less_of_a_core_than(engine, share):
    """Whether the engine's own thread does, once the time is over for which polling is worth while.

    On a busy machine that time begins late.
    """
    deadline_s = time.monotonic() + HANG_S
    while share_of_a_core(engine) >= share:
        if time.monotonic() > deadline_s:
            return False
    return True


def share_of_a_core(engine):
    """How much of a core the engine's own thread takes, which the load of the machine can only lessen."""
    clock = time.pthread_getcpuclockid(engine._thread._thread.ident)
    began_s, used_s = time.monotonic(), time.clock_gettime(clock)
    time.sleep(0.5)
    used_s = time.clock_gettime(clock) - used_s
    return used_s / (time.monotonic() - began_s)


@pytest.mark.parametrize("spin", [True, False])
def test_idle_engine_uses_no_processor_time(spin):
    engine = ProgressEngine(spin_background=spin, spin_waiting=spin)
    engine.start(steps(False, result=1)).wait(HANG_S)
    assert comes_to_take_less_of_a_core_than(engine, 0.2)
    engine.close()


@pytest.mark.parametrize("spin", [True, False])
def test_engine_that_waits_for_peers_leaves_the_core_to_others(spin):
    engine = ProgressEngine(spin_background=spin)
    never = threading.Event()
    engine.start(until(never))
    assert comes_to_take_less_of_a_core_than(engine, 0.6)
    never.set()
    engine.close()


def test_closed_engine_refuses_operations_and_its_thread_ends(engine):
    never = threading.Event()
    handle = engine.start(until(never))
    thread = engine._thread._thread
    engine.close()
    assert not thread.is_alive()
    with pytest.raises(RuntimeError, match="closed"):
        engine.start(steps(False, False))
    # Who waits for what was in flight can still finish it.
    never.set()
    handle.wait(HANG_S)
    engine.close()


def test_engine_that_nobody_refers_to_is_collected_and_its_thread_ends():
    engine = ProgressEngine()
    engine.start(steps(False, result=1)).wait(HANG_S)
    thread, reference = engine._thread._thread, weakref.ref(engine)
    del engine
    thread.join(HANG_S)
    assert not thread.is_alive()
    gc.collect()
    assert reference() is None


def test_interrupt_while_waiting_leaves_the_operation_in_flight(engine, monkeypatch):
    event = threading.Event()
    handle = engine.start(until(event, 1))
    interrupted = []

    def pause(self):
        if not interrupted and threading.current_thread() is threading.main_thread():
            interrupted.append(True)
            raise KeyboardInterrupt
        time.sleep(0.001)

    monkeypatch.setattr("mpitrain.collectives.progress.Backoff.pause", pause)
    with pytest.raises(KeyboardInterrupt):
        handle.wait(HANG_S)
    event.set()
    assert handle.wait(HANG_S) == 1


def test_interrupt_inside_an_operation_does_not_stop_others(engine):
    caller = threading.current_thread()

    def interrupted():
        yield False
        # Only an interrupt of the thread that waits, as a signal would be.
        while threading.current_thread() is not caller:
            yield False
        raise KeyboardInterrupt

    other = engine.start(steps(*[False] * 1000, result=2))
    handle = engine.start(interrupted())
    with pytest.raises(KeyboardInterrupt):
        handle.wait(HANG_S)
    assert handle.done
    assert other.wait(HANG_S) == 2
    assert engine.start(steps(False, False, result=3)).wait(HANG_S) == 3


def test_time_of_waiting_is_exposed_and_the_rest_in_flight_is_hidden(engine, monkeypatch):
    # A clock by hand: it goes while nothing is said to the counters, and while somebody waits.
    now_s = [100.0]
    monkeypatch.setattr(counters, "time", types.SimpleNamespace(monotonic=lambda: now_s[0]))
    event = threading.Event()

    def task():
        yield from until(event)
        now_s[0] += 5

    handle = engine.start(task())
    now_s[0] += 3
    unwaited = engine.counters
    assert (unwaited.exposed_s, unwaited.hidden_s) == (0, 3)
    timer = threading.Timer(0.0, lambda: (wait_until(lambda: engine._waiters), event.set()))
    timer.start()
    handle.wait(HANG_S)
    timer.join(HANG_S)
    waited = engine.counters - unwaited
    assert (waited.exposed_s, waited.hidden_s) == (5, 0)
    now_s[0] += 7
    at_rest = engine.counters - unwaited - waited
    assert (at_rest.exposed_s, at_rest.hidden_s) == (0, 0)


def test_promise_is_resolved_by_another_task(engine):
    promise = engine.promise("named")

    def other():
        yield False
        promise.resolve(9)

    engine.start(other())
    assert promise.wait(HANG_S) == 9
    broken = engine.promise()
    broken.reject(CommError("given up"))
    with pytest.raises(CommError, match="given up"):
        broken.wait(HANG_S)
