"""What goes wrong on one rank is an error on every rank, and nobody hangs."""

from __future__ import annotations

import time

import numpy as np
import pytest
from mpi4py import MPI

from mpitrain.collectives import Communicator
from mpitrain.config import Settings
from mpitrain.errors import (
    CollectiveError,
    CollectiveMismatchError,
    CommError,
    CommRevokedError,
    CommTimeoutError,
    RankFailedError,
)
from tests.support.limits import HANG_S
from tests.support.ranks import outcome

pytestmark = pytest.mark.mpi(min_size=2)

ALGORITHMS = ("native", "ring", "auto")


@pytest.fixture(scope="module")
def comm():
    comm = Communicator.from_mpi(settings=Settings(wait="sleep"))
    yield comm
    comm.free()
    comm.engine.close()


@pytest.fixture
def doomed(comm):
    """A communicator that the test gives up."""
    doomed = comm.duplicate()
    yield doomed
    comm.barrier()
    doomed.free()


def unchecked(comm, **settings):
    return comm.duplicate(comm.settings.replace(check=False, **settings))


def call(comm, form, array, **options):
    answer = getattr(comm, form)(array, **options)
    return answer.wait(HANG_S) if "async" in form else answer


@pytest.mark.parametrize("form", ["allreduce", "allreduce_async"])
@pytest.mark.parametrize("what", ["shape", "dtype", "op", "algorithm"])
def test_mismatch_is_an_error_on_every_rank(comm, what, form):
    odd = comm.rank == comm.size - 1
    array = np.zeros(5 + (odd and what == "shape"), np.float64 if odd and what == "dtype" else np.float32)
    options = {
        "op": "max" if odd and what == "op" else "sum",
        "algorithm": "ring" if odd and what == "algorithm" else "native",
    }
    with pytest.raises(CollectiveMismatchError) as caught:
        call(comm, form, array, **options)
    assert f"ranks {comm.size - 1}: " in str(caught.value)
    assert float(comm.allreduce(np.array(1.0))) == comm.size


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("form", ["allreduce", "allreduce_async"])
def test_mistake_of_one_rank_is_an_error_on_every_rank(comm, form, algorithm):
    kind, op = (ValueError, "median") if comm.rank == 0 else (CollectiveMismatchError, "sum")
    with pytest.raises(kind):
        call(comm, form, np.ones(4), op=op, algorithm=algorithm)
    assert float(comm.allreduce(np.array(1.0))) == comm.size
    assert float(comm.allreduce_async(np.array(1.0), algorithm=algorithm).wait(HANG_S)) == comm.size


def test_mistake_and_mismatch_among_operations_in_flight(comm):
    handles = [comm.allreduce_async(np.ones(3), algorithm="native") for _ in range(3)]
    bad = comm.allreduce_async(np.ones(3 + comm.rank), algorithm="native")
    handles += [comm.allreduce_async(np.ones(3), algorithm="native") for _ in range(3)]
    assert isinstance(outcome(lambda: bad.wait(HANG_S)), CollectiveMismatchError)
    assert [handle.wait(HANG_S).tolist() for handle in handles] == [[comm.size] * 3] * 6


def test_messages_of_different_length_are_noticed_without_the_check(doomed):
    comm = unchecked(doomed)
    count = 4 if comm.rank == 0 else 8
    error = outcome(lambda: comm.allreduce(np.ones(count), algorithm="recursive_doubling"))
    assert isinstance(error, (CollectiveMismatchError, CommError))
    assert isinstance(outcome(comm.barrier), CommRevokedError)


@pytest.mark.parametrize("nbytes", [1000, 8_000_000])
@pytest.mark.parametrize("form", ["allreduce", "allreduce_async"])
def test_rank_whose_messages_fail_makes_all_others_raise(doomed, form, nbytes):
    comm = unchecked(doomed)
    if comm.rank == comm.size - 1:
        sends = []
        isend = comm.transport.isend

        def failing(*arguments):
            sends.append(arguments)
            if len(sends) > 1:
                raise CommError("send: the cable was cut")
            return isend(*arguments)

        comm.transport.isend = failing
    error = outcome(lambda: call(comm, form, np.ones(nbytes // 8), algorithm="ring"))
    assert isinstance(error, CommError)
    assert "cable" in str(error)
    # Memory of the messages that are left over may still be written to: it must stay.
    del error
    junk = [np.full(nbytes // 8, 7.0) for _ in range(3)]
    doomed.barrier()
    assert all(float(each.min()) == float(each.max()) == 7.0 for each in junk)


@pytest.mark.parametrize("form", ["allreduce", "allreduce_async"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_rank_that_leaves_is_an_error_on_every_other(doomed, algorithm, form):
    if doomed.rank == 0:
        time.sleep(0.05)
        doomed.leave("has finished early")
        return
    error = outcome(lambda: call(doomed, form, np.ones(50), algorithm=algorithm))
    assert isinstance(error, (RankFailedError, CommRevokedError))
    assert "has finished early" in str(error)


def test_revoke_ends_operations_in_flight(doomed):
    if doomed.rank == 0:
        time.sleep(0.05)
        doomed.revoke("has had enough")
    error = outcome(lambda: doomed.allreduce_async(np.ones(5)).wait(HANG_S))
    assert isinstance(error, CommRevokedError)
    assert "rank 0: has had enough" in str(error)


@pytest.mark.parametrize("form", ["allreduce", "allreduce_async"])
@pytest.mark.parametrize("algorithm", ["native", "ring"])
@pytest.mark.parametrize("check", [True, False])
def test_time_limit_ends_waiting_for_a_rank_that_does_not_come(doomed, check, algorithm, form):
    comm = doomed.duplicate(doomed.settings.replace(check=check, timeout_s=0.2))
    error = None
    if comm.rank != 0:
        error = outcome(lambda: call(comm, form, np.ones(5), algorithm=algorithm))
    # Rank 0 comes when all others have given up.
    doomed.barrier()
    if comm.rank == 0:
        error = outcome(lambda: call(comm, form, np.ones(5), algorithm=algorithm))
    if comm.rank == 0 and not isinstance(error, Exception):
        # The library's own collectives cannot be called off: this late part may still meet those of others.
        assert error.tolist() == [comm.size] * 5
        return
    assert isinstance(error, (CommTimeoutError, CommRevokedError))


def test_nothing_is_sent_after_mpi_has_ended(doomed, monkeypatch):
    # A script may call MPI.Finalize() itself; what happens at exit must then leave MPI alone.
    monkeypatch.setattr(MPI, "Is_finalized", lambda: True)
    with pytest.raises(CommError, match="has been finalized"):
        doomed.transport.notify(0, b"left 0 late")
    assert doomed.transport.notices() == []
    doomed.leave("has finished")
    monkeypatch.undo()
    doomed.barrier()


def test_what_has_failed_on_one_rank_is_not_made_of_what_comes_after_it(doomed):
    # Started before the last rank comes, so that the first one fails with others waiting for its turn.
    comm = doomed.duplicate(doomed.settings.replace(shared_memory=False))
    is_last = comm.rank == comm.size - 1
    if is_last:
        doomed.barrier()
    handles = [comm.allreduce_async_(np.full(2, turn), algorithm="native") for turn in range(3)]
    if comm.rank == 0:
        # The comparison of descriptions is under way by now, and is what MPI calls first.
        comm.transport.native.allreduce = failing_native
    if not is_last:
        doomed.barrier()
    errors = [outcome(lambda: handle.wait(HANG_S)) for handle in handles]  # noqa: B023
    assert all(isinstance(error, CommError) for error in errors), errors
    assert all("no room" in str(error) for error in errors)


def failing_native(*_arguments, **_options):
    raise CommError("no room")


@pytest.mark.parametrize("shared_memory", [True, False])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_blocking_and_asynchronous_forms_do_not_meet(doomed, algorithm, shared_memory):
    comm = doomed.duplicate(doomed.settings.replace(shared_memory=shared_memory))
    for form in ("allreduce", "allreduce_async", "allreduce"):
        assert call(comm, form, np.ones(5), algorithm=algorithm).tolist() == [comm.size] * 5
    form = "allreduce_async" if comm.rank == 0 else "allreduce"
    error = outcome(lambda: call(comm, form, np.ones(5), algorithm=algorithm))
    assert isinstance(error, CollectiveMismatchError if not shared_memory else CollectiveError), error
    assert "asynchronous" in str(error)
    if not shared_memory:
        # Nothing was started.
        handles = [comm.allreduce_async(np.full(5, turn), algorithm=algorithm) for turn in range(20)]
        assert comm.allreduce(np.ones(5), algorithm=algorithm).tolist() == [comm.size] * 5
        assert [float(handle.wait(HANG_S)[0]) for handle in handles] == [turn * comm.size for turn in range(20)]


@pytest.mark.parametrize("form", ["allreduce_", "allreduce_async_"])
@pytest.mark.parametrize("count", [3, 100_000])
def test_different_shared_arrays_are_an_error_on_every_rank(comm, count, form):
    first, second = (comm.allocate(count, "float32") for _ in range(2))
    for _ in range(2):
        with pytest.raises(CollectiveMismatchError, match=" in array "):
            call(comm, form, second if comm.rank == 0 else first)
        first.flat[:] = comm.rank + 1
        call(comm, form, first)
        assert set(first.flat.tolist()) == {comm.size * (comm.size + 1) / 2}


def test_bad_arguments_of_one_rank_for_an_allocation_are_an_error_on_every_rank(comm):
    with pytest.raises(TypeError if comm.rank == 0 else CollectiveMismatchError):
        comm.allocate(5, "float31" if comm.rank == 0 else "float32")
    with pytest.raises(CollectiveMismatchError, match="allocation of float32"):
        comm.allocate(5 + comm.rank, "float32")
    assert comm.allocate(5, "float32").shape == (5,)
