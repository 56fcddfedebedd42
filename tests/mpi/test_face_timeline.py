"""Timelines of jobs that train."""

from __future__ import annotations

import pytest
from mpi4py import MPI

torch = pytest.importorskip("torch")

import mpitrain.torch as hvd  # noqa: E402
from tests.support.traces import checked_trace, names_of  # noqa: E402


@pytest.fixture
def path(tmp_path):
    """A file of rank 0."""
    return MPI.COMM_WORLD.bcast(tmp_path / "timeline.json")


@pytest.mark.parametrize("mark_cycles", [False, True])
def test_timeline_shows_the_parts_of_a_step(path, mark_cycles):
    hvd.init()
    model = torch.nn.Sequential(torch.nn.Linear(11, 300), torch.nn.Linear(300, 7))
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters())

    def step():
        model(torch.ones(3, 11)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        handles = [hvd.allreduce_async(torch.arange(1000.0) * hvd.rank(), op=hvd.Sum) for _ in range(2)]
        assert all(hvd.synchronize(handle)[-1] == 999 * sum(range(hvd.size())) for handle in handles)

    step()
    # Ranks that are ahead or behind would show more or less.
    hvd.barrier()
    hvd.start_timeline(path, mark_cycles)
    hvd.barrier()
    for _ in range(3):
        step()
    hvd.barrier()
    hvd.stop_timeline()
    hvd.barrier()
    step()
    if hvd.rank() == 0:
        trace = checked_trace(path)
        assert trace["otherData"]["missing_ranks"] == []
        assert trace["otherData"]["clock_error_us"] == 0
        for rank in range(hvd.size()):
            names = names_of(trace, rank)
            assert names["optimizer step"] == 3
            if hvd.size() > 1:
                assert names["backward"] == 3
                assert names["bucket fill"] <= 12
                assert names["wait"] >= 3
            assert bool(names["cycle"]) == (mark_cycles and rank == 0)
    hvd.barrier()
    hvd.shutdown()


def test_shutdown_writes_what_the_environment_asks_for(path, monkeypatch):
    monkeypatch.setenv("MPITRAIN_TIMELINE", str(path))
    hvd.init()
    hvd.allreduce(torch.ones(3), name="once")
    hvd.shutdown()
    written = sorted(path.parent.glob("timeline*.json")) if MPI.COMM_WORLD.rank == 0 else []
    if MPI.COMM_WORLD.rank == 0:
        (file,) = written
        trace = checked_trace(file)
        assert all(names_of(trace, rank)["allreduce.once"] for rank in range(trace["otherData"]["ranks"]))
