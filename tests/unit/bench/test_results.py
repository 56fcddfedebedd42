from __future__ import annotations

import csv
import dataclasses
import io
import json

import pytest

from mpitrain.bench.results import read_results, to_csv, to_json
from tests.support.bench_results import make_row, make_run, make_setup, make_train_run


def test_bandwidths_follow_the_definitions():
    # 4 ranks, 3 GB in 2 s.
    row = make_row("ring", 3_000_000_000, 2.0)
    for collective, factor in (("allreduce", 1.5), ("allgather", 0.75), ("broadcast", 1.0)):
        run = make_run({}, setup=make_setup(2, 2), collective=collective, rows=(row,))
        assert run.algbw_bytes_per_s(row) == 1.5e9
        assert run.busbw_bytes_per_s(row) == pytest.approx(1.5e9 * factor)


def test_training_figures_follow_the_definitions():
    run = make_train_run()
    alone, ours, ddp = run.rows
    assert run.samples_per_s(ours) == pytest.approx(2 * 8 / 0.12)
    assert ours.efficiency == pytest.approx(0.1 / 0.12)
    assert [run.added_s(row) for row in (alone, ours, ddp)] == pytest.approx([0.0, 0.01, 0.04])


@pytest.mark.parametrize(
    "results", [make_run({"ring": {8: 1e-5, 64: 2e-5}, "MPI": {8: 1e-6}}), make_train_run()], ids=["run", "train"]
)
def test_what_was_stored_is_read_again(results, tmp_path):
    path = tmp_path / "results.json"
    path.write_text(to_json(results))
    again = read_results(path)
    assert json.loads(to_json(again)) == json.loads(to_json(results))
    assert again.rows == results.rows
    assert again.setup == results.setup


def test_table_has_every_figure():
    lines = list(csv.DictReader(io.StringIO(to_csv(make_run({"ring": {1000: 1e-3}, "MPI": {1000: 2e-3}})))))
    assert [line["side"] for line in lines] == ["ring", "MPI"]
    assert {"benchmark", "ranks", "nodes", "dtype", "op", "nbytes", "p5_s", "p95_s", "wrong"} <= set(lines[0])
    assert (lines[0]["benchmark"], lines[0]["ranks"], float(lines[0]["busbw_bytes_per_s"])) == ("allreduce", "2", 1e6)
    (line, *_) = csv.DictReader(io.StringIO(to_csv(make_train_run())))
    assert float(line["samples_per_s"]) == pytest.approx(16 / 0.11)
    assert to_csv(make_run({})) == ""


def changed(**changes: object) -> str:
    return json.dumps({**json.loads(to_json(make_run({"ring": {8: 1e-5}}))), **changes})


ROW = dataclasses.asdict(make_row("ring", 8, 1e-5))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{", "Expecting property name"),
        ("[" * 100_000, "nested too deeply"),
        ("[]", "not written by mpitrain bench"),
        ('{"ranks": 2}', "not written by mpitrain bench"),
        (changed(format=99), "format: another one is needed, got 99"),
        (changed(rows=3), "rows: must be list, got '3'"),
        (changed(rows=[{**ROW, "median_s": "fast"}]), "median_s of row: must be float, got 'fast'"),
        (changed(rows=[{**ROW, "median_s": 0.0}]), "row: times must be positive"),
        (changed(rows=[{**ROW, "nbytes": True}]), "nbytes of row: must be int, got 'True'"),
        (changed(rows=[{"side": "ring"}]), "row: must have the fields"),
        (changed(collective="allsum"), "collective: unknown, got 'allsum'"),
        (changed(setup={}), "shape: must be dict"),
        (changed(extra=1), "results: must have the fields"),
    ],
)
def test_anything_else_is_refused_with_the_name_of_the_file(text, problem, tmp_path):
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"mpitrain bench \.\.\. --json FILE") as caught:
        read_results(path)
    assert str(caught.value).startswith(f"results {path}: {problem}")


def test_missing_and_binary_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"results: cannot be read, got .*No such file"):
        read_results(tmp_path / "none.json")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"binary\.json"):
        read_results(tmp_path / "binary.json")
