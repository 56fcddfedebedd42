"""What `mpitrain tune` measures on the ranks of this run is found again, and chosen on all of them."""

from __future__ import annotations

import contextlib
import logging
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from mpitrain.cli import tune as tune_module
from mpitrain.cli.job import JobError, meet
from mpitrain.cli.tune import Request, tune_job
from mpitrain.cli.tuning import Effort
from mpitrain.collectives import Communicator
from mpitrain.collectives.choice import AlgorithmChoice
from mpitrain.collectives.selection import Available, known_algorithms
from mpitrain.collectives.table import FORMAT_VERSION, Shape
from mpitrain.collectives.table_file import Machine, load_table, table_path
from mpitrain.config import Settings

MAX_NBYTES = 4096
COLLECTIVES = ("allreduce", "broadcast")


@pytest.fixture
def comm() -> Iterator[Communicator]:
    comm = Communicator.from_mpi(settings=Settings(wait="sleep"))
    yield comm
    comm.free()


@pytest.fixture
def settings(comm: Communicator) -> Iterator[Settings]:
    """One empty folder of tables for all ranks."""
    own = tempfile.TemporaryDirectory() if comm.rank == 0 else contextlib.nullcontext()
    with own as name:
        yield Settings(check=False, wait="sleep", tune_dir=comm.broadcast_obj(name))
        comm.barrier()


@pytest.fixture(autouse=True)
def _hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    # Whoever runs the tests may do something else meanwhile.
    monkeypatch.setattr(tune_module, "_TOO_NOISY", math.inf)
    monkeypatch.setattr(tune_module, "_QUICK", Effort(factor=64, passes=1, rounds=(1, 1)))


def tune(settings: Settings, output: Path | None = None, *, dry_run: bool = False) -> None:
    tune_job(Request(COLLECTIVES, MAX_NBYTES, True, 1.0, output, False, dry_run), settings)


@pytest.mark.mpi(min_size=2)
def test_stored_table_is_found_again_and_all_ranks_choose_the_same(comm, settings):
    tune(settings)
    table = load_table(comm.transport, settings)
    assert table is not None
    tables = comm.allgather_obj(table)
    assert tables == [table] * comm.size
    shape = Shape.of(comm.topology)
    assert {key.collective for key in table.choices} == set(COLLECTIVES)
    assert {key.shape for key in table.choices} == {shape}
    choice = AlgorithmChoice(Available(), shape, table, settings.segment_nbytes)
    chosen = [
        (
            choice.choose(collective, "auto", nbytes, blocking=blocking),
            table.lookup(collective, nbytes, shape, blocking=blocking),
        )
        for collective in COLLECTIVES
        for nbytes in (8, 100, 1000, MAX_NBYTES)
        for blocking in (True, False)
    ]
    assert comm.allgather_obj(chosen) == [chosen] * comm.size
    assert all(measured in (name, "direct") for name, measured in chosen)
    assert table.lookup("allreduce", MAX_NBYTES + 1, shape, blocking=True) is None


@pytest.mark.mpi(min_size=2)
def test_table_is_used_by_communicators_that_are_made_later(comm, settings):
    tune(settings)
    table = load_table(comm.transport, settings)
    made = Communicator.from_mpi(settings=settings)
    for each in (made, related := made.duplicate()):
        assert each._context.choice.table == table
    related.free()
    made.free()


@pytest.mark.mpi(min_size=2)
def test_dry_run_stores_nothing(comm, settings):
    tune(settings, dry_run=True)
    assert load_table(comm.transport, settings) is None
    assert list(Path(settings.tune_dir).iterdir()) == []


@pytest.mark.mpi(min_size=2)
def test_unsteady_times_are_stored_only_where_asked_for(comm, settings, monkeypatch):
    monkeypatch.setattr(tune_module, "_TOO_NOISY", -1.0)
    with pytest.raises(JobError, match="times: too unsteady to be stored"):
        tune(settings)
    assert load_table(comm.transport, settings) is None
    tune(settings, dry_run=True)
    tune(settings, table_path(Machine.here(comm.transport), settings))
    assert load_table(comm.transport, settings) is not None


@pytest.mark.mpi(min_size=2)
def test_table_that_cannot_be_stored_is_an_error_on_all_ranks(comm, settings):
    with pytest.raises(JobError, match="table: cannot be stored") as caught:
        tune(settings, Path("/dev/null/table.json"))
    assert caught.value.is_speaker == (comm.rank == 0)


@pytest.mark.mpi(min_size=2)
def test_new_measurements_replace_a_corrupt_table(comm, settings):
    path = table_path(Machine.here(comm.transport), settings)
    if comm.rank == 0:
        path.write_text("{")
    tune(settings)
    assert load_table(comm.transport, settings) is not None


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("{fingerprint}", "{"),
        ("{fingerprint}", f'{{"format": {FORMAT_VERSION + 1}}}'),
        ("{family}-0123456789ab", "{}"),
    ],
    ids=["corrupt", "other format", "other version"],
)
def test_unusable_table_is_left_out_with_a_warning_of_rank_0(comm, settings, caplog, name, content):
    machine = Machine.here(comm.transport)
    path = Path(settings.tune_dir) / (name.format(fingerprint=machine.fingerprint, family=machine.family) + ".json")
    if comm.rank == 0:
        path.write_text(content)
    comm.barrier()
    with caplog.at_level(logging.WARNING, "mpitrain"):
        assert load_table(comm.transport, settings) is None
    warnings = [record.getMessage() for record in caplog.records if record.name == "mpitrain"]
    assert len(warnings) == (1 if comm.rank == 0 else 0)
    assert all(str(path) in warning and "mpitrain tune" in warning for warning in warnings)


def test_problem_of_one_rank_is_an_error_on_all(comm):
    last = comm.size - 1
    with pytest.raises(JobError, match="cannot be done") as caught:
        meet("request", "cannot be done" if comm.rank == last else "")
    assert caught.value.is_speaker == (comm.rank == 0)
    assert (f"rank {last}: " in str(caught.value)) == (last > 0)


@pytest.mark.mpi(min_size=2)
def test_different_requests_are_an_error_on_all_ranks(comm):
    meet("request")
    with pytest.raises(JobError, match="options: must be the same on every rank"):
        meet(comm.rank)


def test_all_that_is_known_can_be_in_a_table(comm):
    for collective in COLLECTIVES:
        assert set(comm.known_algorithms(collective)) <= {
            name
            for shared in ("direct", "hierarchical")
            for name in known_algorithms(collective, Available(shared=shared))
        }
