from __future__ import annotations

import itertools

import pytest

from mpitrain.bench.measure import Request, measure, sizes_between
from mpitrain.bench.stopwatch import Effort
from mpitrain.cli.bench_tables import collective_heading, collective_lines, training_heading, training_lines
from tests.support.bench_results import make_run, make_train_run
from tests.support.ranks import run_communicators

HASTY = Effort((1, 2), 10.0)


@pytest.mark.parametrize(
    ("low", "high", "factor", "expected"),
    [
        (8, 8, 2, [8]),
        (8, 3, 2, [3]),
        (8, 64, 2, [8, 16, 32, 64]),
        (8, 100, 8, [8, 64, 100]),
        (100, 300, 2, [100, 200, 300]),
    ],
)
def test_sizes_end_with_the_largest(low, high, factor, expected):
    assert sizes_between(low, high, factor) == expected


def test_every_side_is_measured_at_every_size_alike_on_all_ranks():
    request = Request(
        collective="allreduce",
        sizes=(8, 9, 4096),
        dtypes=("float32", "int64"),
        ops=("sum", "max"),
        memories=("host", "window"),
        in_place=True,
        effort=HASTY,
    )

    def body(comm):
        return comm.known_algorithms("allreduce"), list(measure(comm, request))

    results = run_communicators(2, body)
    known, groups = results[0]
    assert results[1] == results[0]
    # 9 bytes become 8 again.
    sizes = [8, 4096]
    assert [(group[0].dtype, group[0].op, group[0].nbytes) for group in groups] == list(
        itertools.product(("float32", "int64"), ("sum", "max"), sizes)
    )
    for group in groups:
        assert [(row.side, row.memory) for row in group] == [
            (name, memory) for memory in ("host", "window") for name in known
        ]
        assert all(row.wrong == 0 and row.iterations == 2 for row in group)
        assert all(0 < row.p5_s <= row.median_s <= row.p95_s for row in group)


def test_unknown_algorithm_is_refused_on_all_ranks():
    request = Request(collective="alltoall", sizes=(8,), algorithms=("auto", "fast"), effort=HASTY)

    def body(comm):
        with pytest.raises(ValueError, match="algorithm of alltoall: unknown, got 'fast'; use one of auto"):
            list(measure(comm, request))

    run_communicators(2, body)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"collective": "barrier"}, "collective: unknown, got 'barrier'"),
        ({"memories": ("disk",)}, "memory: unknown, got 'disk'"),
        ({"memories": ("window",)}, "window memory: only for the form in place, got allreduce"),
        ({"dtypes": ("float31",)}, "dtype: unsupported dtype, got 'float31'"),
        ({"ops": ("sum", "mean")}, "op: unknown reduction, got 'mean'"),
        ({"dtypes": ("bool",), "ops": ("average",)}, "op: average is not defined for this dtype"),
    ],
)
def test_requests_that_make_no_sense_are_refused(changes, problem):
    with pytest.raises(ValueError, match=problem):
        Request(**{"collective": "allreduce", "sizes": (8,), "effort": HASTY, **changes})


def test_device_memory_needs_a_library_that_works_on_it(monkeypatch):
    from mpitrain.bench import operation

    monkeypatch.setattr(operation.Operation, "_allocate", lambda self, count: None)
    monkeypatch.setattr(operation.Operation, "clear", lambda self: None)
    request = Request(collective="allreduce", sizes=(8,), memories=("device",), effort=HASTY)

    def body(comm):
        with pytest.raises(ValueError, match=r"sides: nothing to measure, .* add --compare nccl"):
            list(measure(comm, request))

    run_communicators(2, body)


def test_table_has_the_columns_of_other_benchmarks():
    run = make_run({"ring": {1_000_000: 1e-3}, "MPI": {1_000_000: 2e-3}, "direct": {1_000_000: 5e-4}})
    *_, columns, units = collective_heading(run, "float32", "sum")
    names = "size count side time p5 p95 algbw busbw #wrong vs MPI"
    assert columns.lstrip("#").split() == names.split()
    assert units.lstrip("#").split() == ["(B)", "(elements)", "(us)", "(us)", "(us)", "(GB/s)", "(GB/s)"]
    lines = [line.split() for line in collective_lines(run, run.rows)]
    assert lines[0] == ["1000000", "250000", "ring", "1000.00", "900.00", "1200.00", "1.000", "1.000", "0", "2.00x"]
    assert [line[-1] for line in lines] == ["2.00x", "1.00x", "4.00x"]
    # Columns end where their headings end.
    assert all(len(line) == len(columns) for line in collective_lines(run, run.rows))


def test_table_of_training_has_the_figures():
    run = make_train_run()
    *_, columns, _ = training_heading(run)
    lines = [line.split() for line in training_lines(run, run.rows)]
    ours = dict(zip(columns.replace("vs DDP", "vs_DDP").split(), lines[1], strict=True))
    assert ours == {
        "model": "mlp",
        "side": "mpitrain",
        "batch": "8",
        "samples/s": "133.3",
        "step": "120.00",
        "p5": "108.00",
        "p95": "132.00",
        "efficiency": "83.3%",
        "added": "10.00",
        "exposed": "4.00",
        "hidden": "20.00",
        "cores": "0.90",
        "memory": "1",
        "vs_DDP": "1.25x",
    }
    assert [line[9:11] for line in (lines[0], lines[2])] == [["-", "-"]] * 2
