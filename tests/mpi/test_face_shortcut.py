"""Small all-reduces that all ranks wait for, among operations of every other kind."""

from __future__ import annotations

import random

import pytest

torch = pytest.importorskip("torch")

import mpitrain.torch as hvd  # noqa: E402
from tests.support.training import initialized  # noqa: E402

pytestmark = pytest.mark.mpi(min_size=2)


@pytest.fixture(autouse=True)
def _initialized():
    with initialized():
        yield


@pytest.fixture
def announced(monkeypatch):
    """What this rank has announced."""
    names = []
    in_flight = hvd.global_process_set.negotiator._in_flight
    announce = in_flight._announce
    monkeypatch.setattr(in_flight, "_announce", lambda each: (names.append(each.name), announce(each)))
    return names


def total(number):
    return hvd.size() * number + sum(range(hvd.size()))


def test_every_form_that_waits_goes_without_an_announcement(announced):
    before = hvd.communication_counters()
    for number in range(20):
        mine = torch.full((3, 2), float(number + hvd.rank()))
        assert hvd.allreduce(mine, op=hvd.Sum).eq(total(number)).all()
        assert hvd.allreduce(mine, name="named").allclose(torch.tensor(total(number) / hvd.size()))
        assert hvd.allreduce(mine.half(), compression=hvd.Compression.fp16, op=hvd.Max).max() == number + hvd.size() - 1
        assert hvd.grouped_allreduce([mine.t()], op=hvd.Sum)[0].eq(total(number)).all()
        assert hvd.allreduce_(mine.t(), op=hvd.Sum, prescale_factor=2.0, postscale_factor=0.5).eq(total(number)).all()
        assert mine.eq(total(number)).all()
    assert announced == []
    after = hvd.communication_counters()
    assert after.operations - before.operations == 100
    assert after.nbytes - before.nbytes == 20 * (4 * 24 + 12)


def test_a_gradient_flows_back_the_same_way(announced):
    mine = torch.ones(4, requires_grad=True)
    (hvd.allreduce(mine, name="x", op=hvd.Sum) * (hvd.rank() + 1)).sum().backward()
    assert mine.grad.tolist() == [total(1)] * 4
    assert announced == []


@pytest.mark.parametrize("seed", range(3))
def test_any_mixture_of_operations(seed):
    """All ranks start the same operations in order, each waits for it now or later, whatever the others do."""
    choice = random.Random(1000 * seed + hvd.rank())
    kinds = random.Random(seed)
    late = []
    for number in range(150):
        mine = torch.full((kinds.choice([1, 7, 30_000]),), float(number + hvd.rank()))
        kind = kinds.choice(["sum", "sum", "sum", "in place", "gather"])
        if kind == "gather":
            gathered = hvd.allgather(mine[:1], name=f"{number}")
            assert gathered.tolist() == [number + rank for rank in range(hvd.size())]
        elif choice.random() < 0.7:
            result = (hvd.allreduce_ if kind == "in place" else hvd.allreduce)(mine, name=f"{number}", op=hvd.Sum)
            assert result.eq(total(number)).all()
        else:
            late.append((number, hvd.allreduce_async(mine, name=f"{number}", op=hvd.Sum)))
        while late and choice.random() < 0.5:
            waited, handle = late.pop(choice.randrange(len(late)))
            assert hvd.synchronize(handle).eq(total(waited)).all()
    for waited, handle in late:
        assert hvd.synchronize(handle).eq(total(waited)).all()
