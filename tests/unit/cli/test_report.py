from __future__ import annotations

import html.parser
import re
import sys

import pytest
from click.testing import CliRunner

from mpitrain.bench.model import Cluster, time_s
from mpitrain.bench.plots import Curve, bar_plot, size_plot
from mpitrain.bench.report import sections_of
from mpitrain.bench.results import to_json
from mpitrain.cli.report import report
from tests.support.bench_results import make_row, make_run, make_setup, make_train_run

SIZES = (1 << 10, 1 << 20, 1 << 24)


def make_results(ranks: int, **changes):
    setup = make_setup(1, ranks)
    times_s = {
        name: {nbytes: time_s("allreduce", name, nbytes, setup.shape, Cluster()) for nbytes in SIZES}
        for name in ("direct", "ring", "double_tree")
    }
    times_s["MPI"] = {nbytes: 1.5 * times_s["ring"][nbytes] for nbytes in SIZES}
    return make_run(times_s, setup=setup, **changes)


class Page(html.parser.HTMLParser):
    """What a page consists of, and whether all elements are closed."""

    EMPTY = ("meta", "use", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("href", "src", "xlink:href", "data")]
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.EMPTY:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in self.EMPTY:
            assert self.open.pop() == tag


def make_page(tmp_path, *all_results, arguments=()):
    paths = []
    for number, results in enumerate(all_results):
        paths.append(tmp_path / f"{number}.json")
        paths[-1].write_text(to_json(results))
    output = tmp_path / "new" / "page.html"
    done = CliRunner().invoke(report, [*map(str, paths), "--output", str(output), *arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return output.read_text(), done.output


def test_page_is_whole_and_needs_nothing_else(tmp_path):
    text, told = make_page(tmp_path, make_results(4), make_train_run(), make_results(2))
    page = Page(text)
    assert told == f"stored in {tmp_path / 'new' / 'page.html'}\n"
    # Time, bandwidth, speed-up and model of two runs, two of their scaling, three of training.
    assert page.tags.count("svg") == 2 * 4 + 2 + 3
    assert all(link.startswith("#") for link in page.links)
    assert not re.search(r"url\((?!['\"]?#)|@import|<script", text)
    assert 'name="viewport"' in text
    headings = re.findall(r"<h2>(.*?)</h2>", text)
    assert headings == [
        "allreduce, float32 sum, in place: 2 ranks on 1 node",
        "allreduce, float32 sum, in place: 4 ranks on 1 node",
        "Scaling: allreduce, float32 sum, in place",
        "Training steps: 2 ranks on 1 node",
    ]
    assert page.tags.count("tr") == 2 * (4 * len(SIZES) + 1) + 3 + 1


def test_same_results_make_the_same_page(tmp_path):
    assert make_page(tmp_path, make_results(2))[0] == make_page(tmp_path, make_results(2))[0]


def test_plots_can_be_had_as_files(tmp_path):
    _, told = make_page(tmp_path, make_results(2), arguments=["--png"])
    files = sorted((tmp_path / "new").glob("*.png"))
    assert len(files) == 4
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in files)
    assert all(str(path) in told for path in files)


def test_figures_are_those_of_the_results():
    (section,) = sections_of([make_results(2)])
    by_name = {plot.name.rpartition("-")[2]: plot for plot in section.plots}
    assert list(by_name) == ["time", "busbw", "speedup", "model"]
    # The model made these times, so it fits.
    assert section.notes[-1].startswith(("The fitted model is off by 0%", "The fitted model is off by 1%"))
    ring = next(line for line in section.cells if line[:2] == ("16 MiB", "ring"))
    seconds = time_s("allreduce", "ring", 1 << 24, make_setup(1, 2).shape, Cluster())
    assert ring[-3:-1] == (f"{(1 << 24) / seconds / 1e9:.3f}",) * 2


def test_what_is_not_there_is_left_out():
    row = make_row("fast", 8, 1e-5, dtype="int8", wrong=3)
    (section,) = sections_of([make_run({}, collective="alltoall", in_place=False, rows=(row,))])
    assert [plot.name.rpartition("-")[2] for plot in section.plots] == ["time", "busbw"]
    assert "Wrong results: fast." in section.notes
    assert section.title == "alltoall, int8 sum, new arrays: 2 ranks on 1 node"


def test_training_with_several_numbers_of_ranks_shows_how_it_scales():
    sections = sections_of([make_train_run(), make_train_run(setup=make_setup(1, 4))])
    assert [section.title for section in sections] == [
        "Training steps: 2 ranks on 1 node",
        "Training steps: 4 ranks on 1 node",
        "Scaling: training steps",
    ]


def test_text_of_results_is_no_markup(tmp_path):
    setup = make_setup(machine="<script>alert(1)</script>")
    text, _ = make_page(tmp_path, make_run({"<b>ring": {8: 1e-5}}, setup=setup), arguments=["--title", "<i>"])
    assert "<script" not in text
    assert "<b>" not in text
    assert "<i>" not in text
    Page(text)


def test_plots_draw_what_they_are_told():
    curves = [Curve("ring", {8: 1.0, 64: 2.0}, {8: (0.5, 1.5), 64: (1.0, 3.0)}), Curve("ring", {8: 1.0}, is_model=True)]
    text = size_plot("name", "caption", [*curves, Curve("MPI", {8: 3.0}, is_library=True)], y_label="time").svg()
    assert text.startswith("<svg")
    # One legend entry for measurement and model of one algorithm.
    assert text.count(">ring</text>") == 1
    assert text.count(">MPI</text>") == 1
    bars = bar_plot("name", "caption", {"mlp": {"a": 1.0, "b": 2.0}, "gpt": {"b": 3.0}}, y_label="samples/s").svg()
    assert all(f">{word}</text>" in bars for word in ("mlp", "gpt", "a", "b", "samples/s"))


def test_page_that_cannot_be_stored_is_a_value_error(tmp_path):
    path = tmp_path / "results.json"
    path.write_text(to_json(make_results(2)))
    with pytest.raises(ValueError, match="report: cannot be stored"):
        CliRunner().invoke(report, [str(path), "--output", "/dev/null/page.html"], catch_exceptions=False)


def test_results_without_figures_and_missing_packages_are_value_errors(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    path.write_text(to_json(make_run({})))
    with pytest.raises(ValueError, match="report: nothing was measured"):
        CliRunner().invoke(report, [str(path)], catch_exceptions=False)
    monkeypatch.setitem(sys.modules, "mpitrain.bench.report", None)
    with pytest.raises(ValueError, match=r"report: a package is missing, .*pip install mpitrain\[report\]"):
        CliRunner().invoke(report, [str(path)], catch_exceptions=False)
