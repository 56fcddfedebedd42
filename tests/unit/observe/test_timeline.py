"""Timelines of ranks that are threads of one process."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from mpitrain.config import Settings
from mpitrain.observe import timeline
from tests.support.limits import HANG_S
from tests.support.ranks import outcome, run_communicators
from tests.support.traces import checked_trace, names_of

SETTINGS = Settings(wait="sleep", check=False, segment_nbytes=4096, staging_nbytes=1 << 14)
COUNT = 5001


@pytest.fixture(autouse=True)
def _patience(monkeypatch):
    # Ranks answer here, but where they are slow.
    monkeypatch.setattr(timeline, "_PATIENCE_S", HANG_S)
    monkeypatch.setattr(timeline, "_PATIENCE_WITH_LEAVERS_S", HANG_S)
    monkeypatch.setattr(timeline, "_CLOCK_PATIENCE_S", HANG_S)


def work(comm, algorithm="ring"):
    array = np.arange(COUNT, dtype=np.float64) * (comm.rank + 1)
    comm.allreduce_(array, algorithm=algorithm)
    factor = comm.size * (comm.size + 1) // 2
    np.testing.assert_array_equal(array, np.arange(COUNT, dtype=np.float64) * factor)


def end(comm):
    """Stop, and answer rank 0 to the end, as a progress thread does whose communicator lives on."""
    comm.timeline.stop()
    comm.timeline.finish()


@pytest.mark.parametrize("ranks_per_node", [1, 2, None])
def test_file_has_what_all_ranks_did_by_one_clock(tmp_path, ranks_per_node):
    path = tmp_path / "timeline.json"

    def body(comm):
        comm.timeline.start(path)
        comm.barrier()
        work(comm)
        if comm.known_algorithms("allreduce").count("direct"):
            work(comm, "direct")
        handle = comm.allreduce_async(np.full(3, comm.rank))
        assert handle.wait().tolist() == [6] * 3
        comm.barrier()
        end(comm)

    run_communicators(4, body, settings=SETTINGS, ranks_per_node=ranks_per_node)
    trace = checked_trace(path)
    facts = trace["otherData"]
    assert facts["missing_ranks"] == []
    for process in facts["processes"]:
        # All are threads of this process, so the true offset is known to be none.
        assert abs(process["clock_offset_us"]) <= process["clock_error_us"]
        assert process["dropped_events"] == 0
    is_one_node = ranks_per_node is None
    assert (facts["clock_error_us"] == 0) == is_one_node
    for rank in range(4):
        names = names_of(trace, rank)
        assert names["barrier"]
        assert names["allreduce"]
        assert names["wait"]
        assert names["reduce"]
        assert names["transfer"] or names["wait for peers"]
    ends = {}
    for event in trace["traceEvents"]:
        if event["name"] == "barrier" and event["tid"] >= 100:
            ends.setdefault(event["pid"], []).append((event["ts"], event["ts"] + event["dur"]))
    # Nobody leaves a barrier before the last one has come, by whatever clock.
    last_begin = max(spans[0][0] for spans in ends.values())
    assert all(spans[0][1] >= last_begin - facts["clock_error_us"] for spans in ends.values())


def test_it_is_enough_that_rank_0_calls(tmp_path):
    path = tmp_path / "timeline.json"

    def body(comm):
        for _ in range(2):
            if comm.rank == 0:
                comm.timeline.start(path)
            # The others learn of it while they wait for rank 0, or of themselves.
            deadline_s = time.monotonic() + HANG_S
            while not comm.timeline.is_recording:
                assert time.monotonic() < deadline_s
                time.sleep(0.01)
            comm.barrier()
            work(comm)
            comm.barrier()
            if comm.rank == 0:
                comm.timeline.stop()
                for rank in range(comm.size):
                    assert names_of(checked_trace(path), rank)["allreduce"] >= 1
                path.unlink()
            comm.barrier()

    run_communicators(3, body, settings=SETTINGS)


def test_timelines_follow_each_other_and_are_not_mixed_up(tmp_path):
    def body(comm):
        for number in range(3):
            comm.timeline.start(tmp_path / f"{number}.json")
            comm.allreduce(np.arange(number + 1))
            end(comm)

    run_communicators(2, body, settings=SETTINGS)
    for number in range(3):
        trace = checked_trace(tmp_path / f"{number}.json")
        details = {
            event["args"]["details"]
            for event in trace["traceEvents"]
            if event["name"] == "allreduce" and event["pid"] == 0 and event["tid"] >= 100
        }
        assert len(details) == 1
        assert f"[{number + 1}]" in details.pop()


def test_what_is_too_much_is_dropped_and_counted(tmp_path):
    path = tmp_path / "timeline.json"

    def body(comm):
        comm.timeline.start(path)
        for _ in range(20):
            comm.barrier()
        end(comm)

    run_communicators(2, body, settings=SETTINGS.replace(timeline_events=10))
    for process in checked_trace(path)["otherData"]["processes"]:
        assert process["events"] == 10
        assert process["dropped_events"] >= 30


def test_failed_rank_still_leaves_a_file(tmp_path):
    path = tmp_path / "timeline.json"

    def body(comm):
        comm.timeline.start(path)
        comm.barrier()
        if comm.rank == 1:
            comm.leave("has failed with ValueError: test")
            comm.timeline.finish()
            return None
        error = outcome(lambda: work(comm))
        comm.timeline.finish()
        return error

    errors = run_communicators(3, body, settings=SETTINGS)
    assert all(isinstance(errors[rank], Exception) for rank in (0, 2))
    trace = checked_trace(path)
    assert trace["otherData"]["missing_ranks"] == []
    assert names_of(trace, 1)["barrier"]


def test_ranks_that_do_not_answer_are_named(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(timeline, "_PATIENCE_S", 0.2)
    path = tmp_path / "timeline.json"
    is_deaf, has_ended = threading.Event(), threading.Event()

    def body(comm):
        comm.timeline.start(path)
        comm.barrier()
        if comm.rank == 1:
            comm.engine.close()
            is_deaf.set()
            has_ended.wait(HANG_S)
        else:
            is_deaf.wait(HANG_S)
            comm.timeline.stop()
            has_ended.set()

    run_communicators(2, body, settings=SETTINGS)
    assert checked_trace(path)["otherData"]["missing_ranks"] == [1]
    assert "ranks [1] have not sent" in caplog.text


def test_unusable_file_and_second_timeline_are_refused_at_once(tmp_path):
    def body(comm):
        with pytest.raises(OSError, match="missing"):
            comm.timeline.start(tmp_path / "missing" / "timeline.json")
        assert not comm.timeline.is_recording
        comm.timeline.start(tmp_path / "timeline.json")
        with pytest.raises(ValueError, match="is being recorded already"):
            comm.timeline.start(tmp_path / "second.json")
        assert not (tmp_path / "second.json").exists()
        comm.timeline.stop()
        comm.timeline.stop()  # again changes nothing

    run_communicators(1, body, settings=SETTINGS)


def test_nothing_is_recorded_unless_asked_for():
    def body(comm):
        work(comm)
        assert comm.engine.recorder is None
        assert not comm.timeline.is_recording
        comm.timeline.stop()

    run_communicators(2, body, settings=SETTINGS)


def test_operation_that_hangs_is_shown_as_unfinished(tmp_path):
    path = tmp_path / "timeline.json"

    def body(comm):
        comm.timeline.start(path)
        comm.barrier()
        if comm.rank == 0:
            comm.allreduce_async(np.ones(3))
        end(comm)

    run_communicators(2, body, settings=SETTINGS)
    (hanging,) = [event for event in checked_trace(path)["traceEvents"] if event["name"] == "allreduce"]
    assert hanging["pid"] == 0
    assert hanging["args"]["details"].endswith("(unfinished)")
