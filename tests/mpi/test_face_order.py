"""Operations in different order, and operations that some ranks never start: they complete or raise, and never hang."""

from __future__ import annotations

import logging

import pytest

torch = pytest.importorskip("torch")

import mpitrain.torch as hvd  # noqa: E402
from mpitrain.config import Settings  # noqa: E402
from mpitrain.negotiation import dialogue, negotiator, service, stalls  # noqa: E402
from tests.support.clocks import Clock  # noqa: E402

pytestmark = pytest.mark.mpi(min_size=2)


@pytest.fixture
def initialized():
    hvd.init()
    yield
    hvd.shutdown()


@pytest.mark.usefixtures("initialized")
def test_unnamed_operations_of_other_kinds_in_another_order_raise_on_every_rank():
    size, rank = hvd.size(), hvd.rank()
    mine = torch.full((2,), float(rank))
    starts = [lambda: hvd.allreduce_async(mine, op=hvd.Sum), lambda: hvd.allgather_async(mine)]
    handles = [start() for start in (starts if rank % 2 else reversed(starts))]
    for handle in handles:
        with pytest.raises(hvd.HorovodInternalError, match="Mismatched operations: One rank did an"):
            hvd.synchronize(handle)
    # They count all the same, so what comes next meets its own kind.
    assert hvd.allgather(mine[:1]).tolist() == list(range(size))
    assert hvd.allreduce(mine, op=hvd.Sum).tolist() == [size * (size - 1) / 2] * 2


@pytest.mark.usefixtures("initialized")
def test_unnamed_operations_are_counted_for_each_process_set():
    size, rank = hvd.size(), hvd.rank()
    sets = [hvd.add_process_set([other]) for other in range(size)]
    if size > 2:
        sets.append(hvd.add_process_set(list(range(1, size))))
    # Every rank has another number of operations on its sets, among those of all ranks.
    for turn in range(3):
        for process_set in sets:
            if process_set.included():
                for _ in range(rank + turn if process_set.size() == 1 else 2):
                    result = hvd.allreduce(torch.ones(()), op=hvd.Sum, process_set=process_set)
                    assert result.item() == process_set.size()
        assert hvd.allreduce(torch.tensor(10.0**rank), op=hvd.Sum).item() == sum(10.0**other for other in range(size))


class ClockOfStalls(Clock):
    """One that goes on rank 0 when so many ranks have started an operation, and stands still before and elsewhere."""

    def __init__(self, name, number):
        super().__init__()
        self._name, self._number = name, number
        self._has_begun = False

    def monotonic(self):
        coordinator = hvd.global_process_set.negotiator._dialogue._coordinator
        pending = coordinator and coordinator._pending.get(self._name)
        if pending and len(pending.announcements) == self._number and not self._has_begun:
            self._has_begun = True
            self.go(2500.0)
        return super().monotonic()


class ClockOfMeetings(Clock):
    """One that goes when all have come to a meeting but one, and stands still before."""

    def __init__(self):
        super().__init__()
        self._has_begun = False

    def monotonic(self):
        meeting = hvd.global_process_set.negotiator._shortcut.meeting
        if meeting.visitor and len(meeting.missing()) == 1 and not self._has_begun:
            self._has_begun = True
            self.go(2500.0)
        return super().monotonic()


def reduce_at_once(name):
    return hvd.allreduce(torch.ones(2), name=name)


def reduce_announced(name):
    return hvd.synchronize(hvd.allreduce_async(torch.ones(2), name=name))


@pytest.mark.parametrize("reduce", [reduce_at_once, reduce_announced])
@pytest.mark.parametrize("missing", ["first", "last"])
def test_what_not_all_ranks_start_is_warned_of_and_ends_with_an_error_on_all(missing, reduce, caplog, monkeypatch):
    # Rank 0 decides, and has all the time to say so.
    monkeypatch.setattr(stalls, "_GRACE_S", 1e9)
    hvd.init(settings=Settings.from_environ().replace(stall_warning_s=200.0, stall_shutdown_s=1500.0))
    try:
        absent = 0 if missing == "first" else hvd.size() - 1
        others = [rank for rank in range(hvd.size()) if rank != absent]
        if reduce is reduce_announced:
            teller, clock = 0, ClockOfStalls("allreduce.x", hvd.size() - 1)
            modules = (negotiator, dialogue)
        else:
            # By the real clocks of the others nothing is late, but they look for news.
            teller, clock = others[0], ClockOfMeetings()
            modules = (service,) if hvd.rank() == teller else ()
        for module in modules:
            monkeypatch.setattr(module, "time", clock)
        parameter = torch.nn.Parameter(torch.ones(3))
        optimizer = hvd.DistributedOptimizer(torch.optim.SGD([parameter], lr=0.1))
        told = rf"x was not started by ranks \[{absent}\] within 1500 s"
        with caplog.at_level(logging.WARNING, "mpitrain"):
            if hvd.rank() == absent:
                # It waits for the others in something else, and is not left there.
                parameter.sum().backward()
                with pytest.raises(hvd.HorovodInternalError, match=told):
                    optimizer.step()
            else:
                with pytest.raises(hvd.HorovodInternalError, match=told):
                    reduce("x")
            with pytest.raises(hvd.HorovodInternalError, match=told):
                reduce("y")
        if hvd.rank() == teller:
            lines = [record.getMessage() for record in caplog.records if "waits since" in record.getMessage()]
            assert len(lines) > 1
            assert all(line.startswith(f"r{hvd.rank()}/{hvd.size()} | allreduce.x: waits since ") for line in lines)
            assert lines[-1].endswith(f" s for ranks [{absent}]; started by ranks {others}")
    finally:
        hvd.shutdown()
