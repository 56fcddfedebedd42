"""What is said about ranks that are late."""

from __future__ import annotations

import threading

from mpitrain.observe import Whereabouts, report_of_stall, stack_of_thread


def test_report_names_who_has_come_who_is_missing_and_who_does_not_answer():
    answers = {
        0: Whereabouts(8, "allreduce", ("train.py:3 in step",)),
        2: Whereabouts(7, "barrier by native", ("train.py:9 in main", "data.py:5 in load")),
        3: Whereabouts(0, "", ()),
    }
    lines = report_of_stall("allreduce of x", 7, 61.2, 5, answers).splitlines()
    assert lines == [
        "allreduce of x: waits for other ranks since 61 s",
        "  arrived: ranks 0",
        "  missing: rank 2, which has called 7 operations here, the latest barrier by native; it is at",
        "    train.py:9 in main",
        "    data.py:5 in load",
        "  missing: rank 3, which has called nothing here yet; it is at",
        "    (its thread has ended)",
        "  no answer: ranks 1, 4; their processes are stopped, or busy without letting go",
    ]


def test_report_of_ranks_that_have_all_come_shows_where_they_are():
    answers = {rank: Whereabouts(3, "barrier", (f"train.py:{rank} in wait",)) for rank in range(2)}
    report = report_of_stall("barrier", 2, 60.0, 2, answers)
    assert "arrived: ranks 0, 1" in report
    assert "rank 1 is at\n    train.py:1 in wait" in report
    assert "missing" not in report


def test_many_missing_ranks_are_cut_short():
    answers = {rank: Whereabouts(0, "", ("a.py:1 in f",)) for rank in range(1, 100)}
    answers[0] = Whereabouts(1, "barrier", ())
    lines = report_of_stall("barrier", 0, 60.0, 100, answers).splitlines()
    assert len(lines) < 50
    assert lines[-1].startswith("  missing: further ranks 17, 18")
    assert lines[-1].endswith("98, 99")


def test_stack_is_that_of_the_thread_and_empty_when_it_has_ended():
    reached, go_on = threading.Event(), threading.Event()

    def deep_inside():
        reached.set()
        go_on.wait()

    thread = threading.Thread(target=deep_inside)
    thread.start()
    reached.wait()
    stack = stack_of_thread(thread.ident)
    go_on.set()
    thread.join()
    assert any(call.endswith("in deep_inside") for call in stack)
    assert len(stack) <= 8
    assert stack_of_thread(thread.ident) == ()
