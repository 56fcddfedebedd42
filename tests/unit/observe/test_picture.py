"""Timelines as pictures and tables."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET

import pytest
from click.testing import CliRunner

from mpitrain.cli.timeline import timeline
from mpitrain.observe.clocks import SAME_CLOCK, ClockMap, Offset
from mpitrain.observe.picture import draw_trace, read_trace
from mpitrain.observe.recorder import Event
from mpitrain.observe.trace_file import Part, write_trace

MS = 10**6
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def file(tmp_path):
    """Two ranks, of which the second has a clock that is 5 s behind."""
    path = tmp_path / "timeline.json"
    names = {0: "main", 100: "in flight 1"}
    events = [
        Event(0, "bucket fill", "weight <1>", 11 * MS, 12 * MS),
        Event(0, "backward", "", 10 * MS, 20 * MS),
        Event(100, "reduce", "", 22 * MS, 24 * MS),
        Event(100, "allreduce", "by ring", 21 * MS, 25 * MS),
    ]
    behind = 5000 * MS
    late = [event._replace(begin_ns=event.begin_ns - behind, end_ns=event.end_ns - behind) for event in events]
    parts = {
        0: Part("here", 1, events, 0, names, ClockMap(SAME_CLOCK, SAME_CLOCK)),
        1: Part("there", 2, late, 3, names, ClockMap(Offset(0, behind, 1000), None)),
    }
    write_trace(path, 3, parts, 10 * MS, 30 * MS)
    return path


def test_clocks_are_aligned_in_the_file(file):
    trace = json.loads(file.read_text())
    begins = {(event["pid"], event["name"]): event["ts"] for event in trace["traceEvents"] if event["ph"] == "X"}
    for name, begin_us in (("backward", 0), ("bucket fill", 1000), ("allreduce", 11000), ("reduce", 12000)):
        assert begins[0, name] == begins[1, name] == begin_us
    assert trace["otherData"]["missing_ranks"] == [2]
    assert trace["otherData"]["clock_error_us"] == 1.0


def test_every_span_is_a_box_of_its_length(file):
    root = ET.fromstring(draw_trace(read_trace(file)))
    widths = {}
    for box in root.iter(f"{SVG}rect"):
        title = box.find(f"{SVG}title")
        if title is not None:
            widths.setdefault(title.text, []).append(float(box.get("width")))
    assert set(widths) == {
        "bucket fill weight <1>: 1.000 ms",
        "backward : 10.000 ms",
        "reduce : 2.000 ms",
        "allreduce by ring: 4.000 ms",
    }
    assert all(len(each) == 2 and each[0] == each[1] for each in widths.values())
    (backward, _), (allreduce, _) = widths["backward : 10.000 ms"], widths["allreduce by ring: 4.000 ms"]
    assert backward == pytest.approx(2.5 * allreduce, rel=0.01)


def test_part_of_a_timeline_shows_only_what_is_within(file):
    picture = draw_trace(read_trace(file), 0.0105, 0.02)
    assert "reduce" in picture
    assert "backward" not in picture
    with pytest.raises(ValueError, match=r"nothing between 0\.019 and 0\.02 s"):
        draw_trace(read_trace(file), 0.019, 0.02)


def test_command_prints_times_and_draws(file, tmp_path):
    target = tmp_path / "picture.svg"
    result = CliRunner().invoke(timeline, [str(file), "--svg", str(target)])
    assert result.exception is None
    assert "backward" in result.output
    assert "10.0" in result.output
    assert "--begin" not in result.output
    ET.parse(target)


def test_command_tells_where_steps_begin_if_that_is_late(file, tmp_path):
    trace = json.loads(file.read_text())
    trace["otherData"]["duration_s"] = 3.4
    for event in trace["traceEvents"]:
        if event["ph"] == "X":
            event["ts"] += 3.383e6
    file.write_text(json.dumps(trace))
    result = CliRunner().invoke(timeline, [str(file), "--svg", str(tmp_path / "all.svg")])
    assert "the first backward pass begins at 3.38 s: draw from there with --begin 3.38" in result.output
    result = CliRunner().invoke(timeline, [str(file), "--svg", str(tmp_path / "part.svg"), "--begin", "3.38"])
    assert "first backward" not in result.output
    assert "backward" in (tmp_path / "part.svg").read_text()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"otherData": {"format": "other"}}', "no json"])
def test_other_files_are_refused(tmp_path, text):
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="must be a timeline of mpitrain"):
        read_trace(path)
    result = CliRunner().invoke(timeline, [str(path)])
    assert isinstance(result.exception, ValueError)
