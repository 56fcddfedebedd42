"""The cases of the unit tests on real MPI, with its own collectives among the algorithms."""

from __future__ import annotations

import numpy as np
import pytest
from mpi4py import MPI

from mpitrain.collectives import Communicator
from mpitrain.config import Settings
from mpitrain.schedules import ALGORITHMS
from tests.support.cases import ALL_ALGORITHMS, OPS, Case, counts_for, grid, has_meaning, run_cases
from tests.support.limits import HANG_S

pytest.importorskip("torch")
WITH_NATIVE = [*ALL_ALGORITHMS, *((collective, "native") for collective in ALGORITHMS)]
SETTINGS = {
    "checked": Settings(wait="sleep"),
    "segments": Settings(wait="sleep", check=False, segment_nbytes=64, receive_window=2),
}


@pytest.fixture(scope="module", params=SETTINGS)
def comm(request):
    comm = Communicator.from_mpi(settings=SETTINGS[request.param])
    yield comm
    comm.free()
    comm.engine.close()


@pytest.mark.parametrize(("collective", "algorithm"), WITH_NATIVE)
def test_results_are_exact(comm, collective, algorithm):
    assert run_cases(comm, collective, algorithm, grid(collective, comm.size)) >= 8


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("collective", ["allreduce", "allgather", "broadcast", "reduce", "reduce_scatter"])
def test_results_are_exact_by_load_and_store(comm, collective):
    if "direct" not in comm.known_algorithms(collective):
        pytest.skip("no shared memory in these settings")
    assert run_cases(comm, collective, "direct", grid(collective, comm.size)) >= 8


@pytest.mark.parametrize("collective", ALGORITHMS)
def test_results_are_exact_whatever_is_chosen(comm, collective):
    cases = [Case(count=count, form=form) for count in counts_for(comm.size) for form in ("new", "async")]
    run_cases(comm, collective, "auto", iter(cases))


@pytest.mark.parametrize(
    "dtype", ["bfloat16", "float16", "bool", "complex64", "complex128", "int8", "uint16", "float64"]
)
def test_native_reductions_of_every_dtype(comm, dtype):
    for form in ("in place", "async"):
        for collective in ("allreduce", "reduce", "reduce_scatter"):
            cases = [
                Case(count=33, dtype=dtype, op=op, form=form, root=comm.size - 1, library="torch")
                for op in OPS
                if has_meaning(op, dtype) and (dtype != "uint16" or op == "sum")
            ]
            run_cases(comm, collective, "native", iter(cases))


def test_mixed_algorithms_in_flight_blocking_and_asynchronous(comm):
    # Schedules, native collectives that the progress thread starts late, and blocking ones in between.
    names = ("ring", "native", "recursive_doubling", "native", "double_tree", "native")
    handles = []
    total = comm.size * (comm.size - 1) // 2
    for turn in range(60):
        array = np.full(50, comm.rank + turn, np.int64)
        handles.append(comm.allreduce_async_(array, algorithm=names[turn % 6]))
        if turn % 4 == 3:
            assert int(comm.allreduce(np.array([comm.rank]), algorithm=names[turn % 5])[0]) == total
        if turn % 10 == 9:
            root = turn % comm.size
            assert int(comm.broadcast(np.array([comm.rank]), root=root, algorithm="native")[0]) == root
    order = list(enumerate(handles))
    for turn, handle in order if comm.rank % 2 else reversed(order):
        assert handle.wait(HANG_S).tolist() == [total + turn * comm.size] * 50


def test_native_operations_in_flight_while_communicators_are_made(comm):
    # The library matches its collectives by order, and making a communicator is one of them.
    total = comm.size * (comm.size - 1) // 2
    for turn in range(10):
        handles = [comm.allreduce_async_(np.full(7, comm.rank), algorithm="native") for _ in range(5)]
        part = comm.split(comm.rank % 2) if turn % 2 else comm.duplicate()
        assert part.allgather_obj(part.rank) == list(range(part.size))
        assert comm.topology.local_size == comm.size
        for handle in handles:
            assert handle.wait(HANG_S).tolist() == [total] * 7
        part.free()


def test_operations_started_in_opposite_order_on_two_communicators_finish(comm):
    other = comm.duplicate()
    for algorithm in ("ring", "native"):
        pair = (comm, other) if comm.rank % 2 else (other, comm)
        handles = [each.allreduce_async(np.full(9, 1.0), algorithm=algorithm) for each in pair]
        assert [float(handle.wait(HANG_S)[0]) for handle in handles] == [comm.size] * 2
    other.free()


def test_communicator_of_a_part_of_the_ranks(comm):
    world = MPI.COMM_WORLD
    part = world.Split(world.rank % 2, -world.rank)
    small = Communicator.from_mpi(part, settings=comm.settings)
    part.Free()
    expected = sorted(range(world.rank % 2, world.size, 2), reverse=True)
    assert small.allgather_obj(world.rank) == expected
    assert int(small.allreduce(np.array([world.rank]), algorithm="ring")[0]) == sum(expected)
    assert int(small.allreduce(np.array([world.rank]), algorithm="native")[0]) == sum(expected)
    small.free()
    small.engine.close()


def test_communicator_of_listed_ranks(comm):
    ranks = list(range(MPI.COMM_WORLD.size))[::-1]
    listed = Communicator.from_mpi(ranks, settings=comm.settings)
    assert listed.allgather_obj(MPI.COMM_WORLD.rank) == ranks
    listed.free()
    listed.engine.close()


def test_more_communicators_than_the_library_has_room_for_operations(comm):
    # mpi4py has room for 32 user-defined reductions; bfloat16 needs one for each kind of reduction.
    case = Case(count=5, dtype="bfloat16")
    for _ in range(40):
        other = comm.duplicate()
        run_cases(other, "allreduce", "native", iter([case]))
        other.free()


def iter_nothing():
    yield


def test_objects(comm):
    values = comm.allgather_obj({"rank": comm.rank, "text": "x" * 1000 * comm.rank})
    assert [value["rank"] for value in values] == list(range(comm.size))
    assert comm.broadcast_obj(("from", comm.rank), root=comm.size - 1) == ("from", comm.size - 1)
    with pytest.raises(ValueError, match="rank 0: generator cannot be pickled"):
        comm.allgather_obj(iter_nothing() if comm.rank == 0 else 1)


def test_messages_larger_than_what_mpi_sends_eagerly(comm):
    array = np.arange(300_000, dtype=np.float64) + comm.rank
    expected = comm.size * np.arange(300_000, dtype=np.float64) + comm.size * (comm.size - 1) / 2
    with Wide(comm) as wide:
        for algorithm in ("auto", "native", *ALGORITHMS["allreduce"]):
            np.testing.assert_array_equal(wide.allreduce(array, algorithm=algorithm), expected)


class Wide:
    """A duplicate with segments of 100 kB."""

    def __init__(self, comm):
        self.comm = comm.duplicate(comm.settings.replace(segment_nbytes=100_000))

    def __enter__(self):
        return self.comm

    def __exit__(self, *_):
        self.comm.free()


def test_hundreds_of_calls(comm):
    array = np.ones(4, np.float32)
    for turn in range(400):
        comm.allreduce_(array, op="max", algorithm="native" if turn % 2 else "recursive_doubling")
    assert array.tolist() == [1.0] * 4
    assert not comm._calls.in_flight
    assert comm._context.native_order._left == set()
