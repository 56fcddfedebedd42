"""What is kept of what happens."""

from __future__ import annotations

import threading
import time

import pytest

from mpitrain.observe import Recorder


def test_latest_events_are_kept_and_the_others_counted():
    recorder = Recorder(10)
    for number in range(25):
        recorder.add(f"step {number}", number, number + 1)
    events, dropped = recorder.take()
    assert [event.name for event in events] == [f"step {number}" for number in range(15, 25)]
    assert dropped == 15


def test_spans_of_threads_lie_in_lanes_of_their_own():
    recorder = Recorder(100)

    def work():
        with recorder.span("outer", "of a thread"), recorder.span("inner"):
            pass

    threads = [threading.Thread(target=work, name=f"worker {index}") for index in range(3)]
    with recorder.span("main"):
        for thread in threads:
            thread.start()
            thread.join()
    events, dropped = recorder.take()
    assert dropped == 0
    by_lane = {recorder.lane_names[event.lane]: set() for event in events}
    for event in events:
        by_lane[recorder.lane_names[event.lane]].add((event.name, event.details))
    # The operating system may give an ended thread's identity to the next one.
    workers = set(by_lane) - {"main"}
    assert by_lane["main"] == {("main", "")}
    assert workers
    assert all(by_lane[worker] == {("outer", "of a thread"), ("inner", "")} for worker in workers)


def test_operations_in_flight_together_have_different_lanes_which_are_used_again():
    recorder = Recorder(100)
    first, second = recorder.operation("allreduce of a"), recorder.operation("allreduce of b")
    assert first.lane != second.lane
    first.end()
    third = recorder.operation("broadcast")
    assert third.lane == first.lane
    third.end()
    third.end()  # again changes nothing
    assert recorder.operation("allgather").lane == first.lane
    events, _ = recorder.take()
    assert sorted((event.name, event.details) for event in events) == [
        ("allgather", " (unfinished)"),
        ("allreduce", "of a"),
        ("allreduce", "of b (unfinished)"),
        ("broadcast", ""),
    ]


def test_phases_follow_each_other_within_their_operation():
    recorder = Recorder(100)
    trace = recorder.operation("allreduce by ring")

    def task():
        for has_come in (False, True, False):
            time.sleep(0.001)
            if has_come:
                trace.note_message()
                trace.enter("reduce")
            yield has_come
        return 17

    def run():
        result = yield from trace.watch(task())
        assert result == 17

    for _ in run():
        time.sleep(0.001)
    trace.end()
    events, _ = recorder.take()
    assert [event.name for event in events] == ["wait for peers", "reduce", "transfer", "allreduce"]
    whole = events.pop()
    assert whole.begin_ns <= events[0].begin_ns
    for earlier, later in zip(events, [*events[1:], whole._replace(begin_ns=whole.end_ns)], strict=True):
        assert earlier.begin_ns < earlier.end_ns <= later.begin_ns


def test_held_phase_hides_what_its_parts_enter_and_ends_with_its_task():
    recorder = Recorder(100)
    trace = recorder.operation("barrier")

    def part():
        trace.enter("reduce")
        time.sleep(0.001)
        yield False

    for moved in trace.watch(trace.hold("agreement", part())):
        assert not moved
    trace.end()
    assert [event.name for event in recorder.take()[0]] == ["agreement", "barrier"]


def test_failure_of_a_watched_task_goes_through():
    trace = Recorder(10).operation("barrier")

    def failing():
        yield False
        raise ValueError("test")

    watched = trace.watch(failing())
    next(watched)
    with pytest.raises(ValueError, match="test"):
        next(watched)
