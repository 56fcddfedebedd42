"""Other libraries' collectives, on the buffers that ours work on; and what a benchmark stores."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from mpitrain.bench.bandwidth import COLLECTIVES
from mpitrain.bench.measure import Request
from mpitrain.bench.operation import IN_PLACE, Operation, Use
from mpitrain.bench.results import read_results
from mpitrain.bench.rivals import rivals_named
from mpitrain.bench.stopwatch import Effort
from mpitrain.cli.bench_job import Output, bench_collective
from mpitrain.cli.job import JobError
from mpitrain.collectives import Communicator
from mpitrain.config import Settings
from mpitrain.errors import UnavailableError

SETTINGS = Settings(wait="sleep")
HASTY = Effort((1, 1), 10.0)


@pytest.fixture
def comm() -> Iterator[Communicator]:
    comm = Communicator.from_mpi(settings=SETTINGS)
    yield comm
    comm.free()


@pytest.fixture
def folder(comm: Communicator) -> Iterator[Path]:
    """One empty folder for all ranks."""
    own = tempfile.TemporaryDirectory() if comm.rank == 0 else contextlib.nullcontext()
    with own as name:
        yield Path(comm.broadcast_obj(name))
        comm.barrier()


def test_other_libraries_do_the_same(comm):
    uses = [Use(collective, in_place=form) for collective in COLLECTIVES for form in {False, collective in IN_PLACE}]
    uses += [Use("allreduce", dtype, op) for dtype, op in (("int64", "product"), ("bfloat16", "max"), ("bool", "sum"))]
    uses += [Use("reduce_scatter", "float64", "min"), Use("allreduce", "float32", "average")]
    with rivals_named(("mpi", "gloo", "hvd"), comm) as rivals:
        assert [rival.name for rival in rivals] == ["MPI", "Gloo", "hvd"]
        told: dict[str, list[Use]] = {"MPI": [], "Gloo": [], "hvd": []}
        for use in uses:
            operation = Operation(comm, use, 1000)
            for rival in rivals:
                if (call := rival.call(operation)) is not None:
                    told[rival.name].append(use)
                    assert [operation.count_wrong(call), operation.count_wrong(call)] == [0, 0], (rival.name, use)
    lacking = {name: [use.dtype + " " + use.op for use in uses if use not in known] for name, known in told.items()}
    assert lacking == {
        "MPI": ["bfloat16 max", "bool sum", "float32 average"],
        "Gloo": ["bool sum", "float32 average"],
        "hvd": ["bool sum"],
    }


def test_libraries_that_cannot_run_are_refused_on_all_ranks(comm):
    with pytest.raises(ValueError, match="compare: unknown library, got 'horovod'"), rivals_named(("horovod",), comm):
        pass
    import torch

    if not torch.cuda.is_available():
        with pytest.raises(UnavailableError, match="NCCL: needs CUDA devices"), rivals_named(("nccl",), comm):
            pass


@pytest.mark.mpi(min_size=2)
def test_benchmark_prints_and_stores_what_it_measured(comm, folder, capsys):
    request = Request(collective="allgather", sizes=(8, 4096), effort=HASTY)
    output = Output(folder / "new" / "results.json", folder / "results.csv")
    bench_collective(request, ("mpi",), output, SETTINGS)
    run = read_results(output.json_path)
    labels = [*comm.known_algorithms("allgather"), "MPI"]
    assert [row.side for row in run.rows] == labels * 2
    assert run.setup.shape.size == comm.size
    assert all(row.wrong == 0 for row in run.rows)
    assert len(output.csv_path.read_text().splitlines()) == len(run.rows) + 1
    lines = capsys.readouterr().out.splitlines()
    assert bool(lines) == (comm.rank == 0)
    if comm.rank == 0:
        assert sum(not line.startswith("#") for line in lines) == len(run.rows) + 2
        assert lines[-2:] == [f"stored in {output.json_path}", f"stored in {output.csv_path}"]


@pytest.mark.mpi(min_size=2)
def test_what_cannot_be_done_is_an_error_on_all_ranks(comm, folder):
    request = Request(collective="allgather", sizes=(8,), algorithms=("fast",), effort=HASTY)
    for output, problem in (
        (Output(None, None), "algorithm of allgather: unknown, got 'fast'"),
        (Output(folder, None), "results: cannot be stored, got .*is a directory"),
        (Output(None, Path("/dev/null/results.csv")), "results: cannot be stored, got"),
    ):
        with pytest.raises(JobError, match=problem) as caught:
            bench_collective(request, (), output, SETTINGS)
        assert caught.value.is_speaker == (comm.rank == 0)


@pytest.mark.mpi(min_size=2)
def test_wrong_results_are_an_error_on_all_ranks(comm, monkeypatch, capsys):
    true_call = Operation.call

    def broken_call(self, algorithm):
        call = true_call(self, algorithm)
        if algorithm != "ring" or comm.rank:
            return call

        def broken():
            result = call()
            result[0] += 1
            return result

        return broken

    monkeypatch.setattr(Operation, "call", broken_call)
    request = Request(collective="allgather", sizes=(64,), algorithms=("ring", "bruck"), effort=HASTY)
    with pytest.raises(JobError, match="results: wrong for ring; see the column #wrong") as caught:
        bench_collective(request, (), Output(None, None), SETTINGS)
    assert caught.value.is_speaker == (comm.rank == 0)
    if comm.rank == 0:
        lines = [line.split() for line in capsys.readouterr().out.splitlines() if not line.startswith("#")]
        assert [(line[2], line[8]) for line in lines] == [("ring", "1"), ("bruck", "0")]
