"""The MPI library's own collectives: counts beyond its limits."""

from __future__ import annotations

import numpy as np
import pytest

from mpitrain.collectives import Communicator
from mpitrain.comm import mpi_native
from mpitrain.config import Settings
from mpitrain.errors import UnavailableError
from tests.support.cases import Case, run_cases


@pytest.fixture
def comm():
    comm = Communicator.from_mpi(settings=Settings(wait="sleep"))
    yield comm
    comm.free()
    comm.engine.close()


@pytest.mark.parametrize("collective", ["allreduce", "reduce", "broadcast"])
@pytest.mark.parametrize("count", [0, 1, 9, 10, 11, 20, 57])
def test_large_counts_are_cut_into_several_calls(comm, collective, count, monkeypatch):
    monkeypatch.setattr(mpi_native, "_LARGEST_COUNT", 10)
    cases = [
        Case(count=count, dtype=dtype, form=form, root=comm.size - 1, op=op)
        for dtype, op in (("float32", "sum"), ("int64", "average"), ("bfloat16", "max"))
        for form in ("new", "in place", "async", "async in place")
    ]
    run_cases(comm, collective, "native", iter(cases))


def test_calls_are_really_cut(comm, monkeypatch):
    monkeypatch.setattr(mpi_native, "_LARGEST_COUNT", 10)
    assert [piece.size for piece in mpi_native._pieces(np.empty(25))] == [10, 10, 5]
    native = comm.transport.native
    array = np.ones(25)
    from mpitrain.memory import ReduceOp, dtype_named

    requests = native.allreduce(array, dtype_named("float64"), ReduceOp.SUM, blocking=False)
    assert len(requests) == 3
    for request in requests:
        request.mpi.Wait()
    assert array.tolist() == [comm.size] * 25


def test_what_cannot_be_cut_is_refused(comm):

    counts = [2**31 // comm.size + 1] * comm.size
    with pytest.raises(UnavailableError, match="name another algorithm"):
        comm.transport.native.allgather(np.empty(0), counts, None, blocking=True)


@pytest.mark.slow
def test_buffers_beyond_two_to_the_31_bytes(comm):
    if comm.size != 2:
        pytest.skip("needs 2 ranks, as each holds 2 GiB")
    count = 2**31 + 11
    array = np.zeros(count, np.uint8)
    places = [0, 2**30, 2**31 - 1, 2**31, count - 1]
    for algorithm in ("native", "ring"):
        array[places] = np.arange(5, dtype=np.uint8) + comm.rank
        comm.allreduce_(array, algorithm=algorithm)
        assert array[places].tolist() == [1, 3, 5, 7, 9]
        assert int(array[2**31 - 4 : 2**31 + 4].sum()) == 12
    for algorithm in ("native", "binomial"):
        array[places] = np.arange(5, dtype=np.uint8) + 20 * comm.rank
        comm.broadcast_(array, root=1, algorithm=algorithm)
        assert array[places].tolist() == [20, 21, 22, 23, 24]
