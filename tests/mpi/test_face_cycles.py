"""Init and shutdown, many times: nothing of what the system gives out grows."""

from __future__ import annotations

import gc
import pathlib
import threading

import pytest

torch = pytest.importorskip("torch")

import mpitrain.torch as hvd  # noqa: E402
from mpitrain.collectives import departure  # noqa: E402
from mpitrain.comm.mpi import MPITransport  # noqa: E402
from tests.support.ranks import outcome  # noqa: E402

pytestmark = [pytest.mark.timeout(100), pytest.mark.mpi(min_size=2)]

CYCLES = 30
# By then there is all that comes once.
SETTLED = 5
# What MPI opens when it likes.
TOLERANCE = 3


def train_and_use_names():
    params = [torch.nn.Parameter(torch.ones(50)) for _ in range(3)]
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(params, lr=0.1))
    for _ in range(2):
        torch.stack([param.square().sum() for param in params]).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    hvd.allreduce(torch.ones(3), name="a")
    hvd.allgather(torch.ones(2))
    hvd.broadcast_object("object")


def use_process_sets():
    sets = [hvd.add_process_set([rank]) for rank in range(hvd.size())]
    hvd.allreduce(torch.ones(3), process_set=sets[hvd.rank()])
    hvd.remove_process_set(sets[0])


def use_the_core():
    comm = hvd.communicator()
    array = comm.allocate(1000, "float32")
    comm.allreduce_(array)
    part = comm.split(comm.rank % 2)
    part.allreduce(array.numpy())
    comm.duplicate().allreduce_async(torch.ones(3)).wait()


def use_all():
    train_and_use_names()
    use_process_sets()
    use_the_core()


def disagree():
    assert isinstance(outcome(lambda: hvd.allreduce(torch.ones(3 + hvd.rank()), name="e")), hvd.HorovodInternalError)


def leave_one_in_flight():
    if hvd.rank() == 0:
        handle = hvd.allreduce_async(torch.ones(3), name="left")
        hvd.shutdown()
        assert isinstance(outcome(lambda: hvd.synchronize(handle)), hvd.HorovodInternalError)


def give_up():
    if hvd.rank() == 0:
        hvd.communicator().revoke("has had enough")
    assert isinstance(outcome(lambda: hvd.communicator().allreduce(torch.ones(3))), hvd.HorovodInternalError)


@pytest.mark.parametrize("use", [use_all, disagree, leave_one_in_flight, give_up])
def test_nothing_grows(use, monkeypatch):
    transports = []
    make = MPITransport.__init__

    def noted(transport, *arguments):
        make(transport, *arguments)
        transports.append(transport)

    monkeypatch.setattr(MPITransport, "__init__", noted)

    def count():
        # What lies in cycles of references, such as errors and their tracebacks, dies late; the next init frees it.
        gc.collect()
        hvd.init()
        hvd.shutdown()
        return {
            "communicators": sum(not transport._is_freed for transport in transports),
            "watched at exit": len(departure._watch.communicators),
            "file descriptors": len(list(pathlib.Path("/proc/self/fd").iterdir())),
            "shared mappings": pathlib.Path("/proc/self/maps").read_text().count("/dev/shm"),
            "threads": threading.active_count(),
            "threads of the system": len(list(pathlib.Path("/proc/self/task").iterdir())),
        }

    for cycle in range(CYCLES):
        hvd.init()
        use()
        hvd.shutdown()
        if cycle == SETTLED:
            before = count()
    after = count()
    growth = {name: after[name] - before[name] for name in after}
    assert all(number <= TOLERANCE for number in growth.values()), (growth, after)
