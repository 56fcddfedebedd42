from __future__ import annotations

import gc
import threading
import time
import tracemalloc

import numpy as np
import pytest

from mpitrain.collectives import Communicator
from mpitrain.comm import run_ranks
from mpitrain.config import Settings
from mpitrain.errors import CollectiveMismatchError
from tests.support.limits import HANG_S
from tests.support.ranks import SETTINGS, outcome, run_communicators

torch = pytest.importorskip("torch")


class Unpicklable:
    def __reduce__(self):
        raise RuntimeError("made of glass")


# Objects


@pytest.mark.parametrize("size", [1, 2, 5])
def test_allgather_obj_returns_all_values_in_rank_order(size):
    def body(comm):
        return comm.allgather_obj({"rank": comm.rank, "data": "x" * (1000 * comm.rank)})

    expected = [{"rank": rank, "data": "x" * (1000 * rank)} for rank in range(size)]
    assert run_communicators(size, body) == [expected] * size


@pytest.mark.parametrize("root", [0, 2])
def test_broadcast_obj_returns_the_roots_value(root):
    def body(comm):
        value = {"of": comm.rank, "lambda": None}
        got = comm.broadcast_obj(value, root=root)
        # The root gets its own object, not a copy.
        assert (got is value) == (comm.rank == root)
        return got

    assert run_communicators(3, body) == [{"of": root, "lambda": None}] * 3


def test_objects_that_are_ignored_need_not_be_picklable():
    results = run_communicators(2, lambda comm: comm.broadcast_obj(Unpicklable() if comm.rank else 5, root=0))
    assert results == [5, 5]


@pytest.mark.parametrize("call", ["allgather_obj", "broadcast_obj"])
def test_unpicklable_object_is_an_error_on_every_rank(call):
    def body(comm):
        value = Unpicklable() if comm.rank == 0 else comm.rank
        error = outcome(lambda: getattr(comm, call)(value))
        return type(error), str(error), comm.allgather_obj(comm.rank)

    results = run_communicators(3, body)
    assert {kind for kind, _, _ in results} == {ValueError}
    assert len({message for _, message, _ in results}) == 1
    assert "rank 0: Unpicklable" in results[0][1]
    assert "made of glass" in results[0][1]
    assert [values for _, _, values in results] == [[0, 1, 2]] * 3


def test_several_unpicklable_objects_are_all_named():
    results = run_communicators(
        4, lambda comm: str(outcome(lambda: comm.allgather_obj(Unpicklable() if comm.rank % 2 else 0)))
    )
    assert len(set(results)) == 1
    assert "rank 1" in results[0]
    assert "rank 3" in results[0]
    assert "rank 2" not in results[0]


def test_broadcast_obj_from_different_roots_is_a_mismatch():
    def body(comm):
        error = outcome(lambda: comm.broadcast_obj("value", root=comm.rank % 2))
        return type(error), float(comm.allreduce(np.array(1.0)))

    assert run_communicators(3, body) == [(CollectiveMismatchError, 3.0)] * 3


def test_broadcast_obj_from_no_root_is_an_error_on_every_rank():
    def body(comm):
        return type(outcome(lambda: comm.broadcast_obj("value", root=7 if comm.rank == 1 else 0)))

    assert run_communicators(3, body) == [
        CollectiveMismatchError,
        ValueError,
        CollectiveMismatchError,
    ]


# Order and concurrency


def test_operations_started_in_opposite_order_on_two_communicators_finish():
    def body(comm):
        other = comm.duplicate()
        pair = (comm, other) if comm.rank % 2 else (other, comm)
        handles = {each: each.allreduce_async(np.full(50, comm.rank + 1.0), algorithm="ring") for each in pair}
        return [float(handles[each].wait(HANG_S)[0]) for each in (comm, other)]

    assert run_communicators(4, body, rendezvous=True) == [[10.0, 10.0]] * 4


def test_operation_whose_peers_are_late_does_not_stop_one_on_another_communicator():
    def body(comm):
        other = comm.duplicate()
        late = None if comm.rank == 0 else comm.allreduce_async(np.ones(5))
        for number in range(10):
            assert float(other.allreduce_async(np.array(number)).wait(HANG_S)) == 3 * number
        late = late or comm.allreduce_async(np.ones(5))
        return late.wait(HANG_S).tolist()

    assert run_communicators(3, body) == [[3.0] * 5] * 3


def test_hundred_operations_in_flight_complete_in_any_order_of_waiting():
    def body(comm):
        arrays = [np.full(17, float(number + comm.rank)) for number in range(100)]
        algorithms = ("ring", "recursive_doubling", "halving_doubling", "double_tree")
        handles = [
            comm.allreduce_async_(array, algorithm=algorithms[number % 4]) for number, array in enumerate(arrays)
        ]
        order = range(100) if comm.rank % 2 else reversed(range(100))
        for number in order:
            assert handles[number].wait(HANG_S) is arrays[number]
        return [float(array[3]) for array in arrays]

    expected = [3.0 * number + 3 for number in range(100)]
    settings = Settings(wait="sleep", segment_nbytes=40, receive_window=1)
    assert run_communicators(3, body, settings=settings, rendezvous=True) == [expected] * 3


def test_blocking_call_while_operations_are_in_flight():
    def body(comm):
        handles = [comm.allreduce_async_(np.full(9, 1.0)) for _ in range(5)]
        total = comm.allreduce(np.array([2.0]))
        return float(total[0]), [float(handle.wait(HANG_S)[0]) for handle in handles]

    assert run_communicators(3, body) == [(6.0, [3.0] * 5)] * 3


def test_threads_with_a_communicator_each():
    def body(comm):
        communicators = [comm.duplicate() for _ in range(3)]
        sums = [0.0] * 3

        def work(number):
            for turn in range(20):
                sums[number] += float(communicators[number].allreduce(np.array(float(turn + comm.rank))))

        threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(HANG_S)
        return sums

    expected = float(sum(2 * turn + 1 for turn in range(20)))
    assert run_communicators(2, body) == [[expected] * 3] * 2


def test_number_of_operations_in_flight_is_exact_whichever_thread_ends_them():
    def body(comm):
        for _ in range(200):
            comm.allreduce_async_(np.ones(2))
        comm.barrier()
        deadline_s = time.monotonic() + HANG_S
        while comm._calls.in_flight and time.monotonic() < deadline_s:
            time.sleep(0.001)
        return len(comm._calls.in_flight), comm._calls.number

    assert run_communicators(2, body) == [(0, 201)] * 2


def test_memory_does_not_grow_with_the_number_of_calls():
    def body(comm):
        array = np.ones(8, np.float32)

        def calls(number):
            for turn in range(number):
                if turn % 2:
                    comm.allreduce_(array, op="max", algorithm="recursive_doubling")
                else:
                    comm.allreduce_async_(array, op="max").wait()

        calls(300)
        comm.barrier()
        if comm.rank == 0:
            gc.collect()
            tracemalloc.start(1)
        calls(2000)
        comm.barrier()
        if comm.rank:
            return 0
        gc.collect()
        grown, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return grown

    # Every call has its tag, so growth of 100 bytes a call would show.
    assert run_communicators(2, body)[0] < 100_000


def test_tags_come_round_again():
    def body(comm):
        comm.transport.max_tag = 5
        # No more at once than there are tags.
        handles = [comm.allreduce_async(np.array([number])) for number in range(4)]
        first = [int(handle.wait()[0]) for handle in handles]
        values = [int(comm.allreduce(np.array([number]), algorithm="ring")[0]) for number in range(40)]
        return values == [3 * number for number in range(40)] and first

    assert run_communicators(3, body) == [[0, 3, 6, 9]] * 3


# Plans


def test_plan_is_run_many_times_on_what_the_array_holds_then():
    def body(comm):
        array = np.zeros(11)
        plan = comm.plan_allreduce_(array, op="average", algorithm="ring")
        assert "ring" in plan.description
        results = []
        for turn in range(5):
            array[:] = turn + comm.rank
            result = plan.run() if turn % 2 else plan.start().wait()
            assert result is array
            results.append(float(array[-1]))
        return results

    assert run_communicators(3, body) == [[1.0, 2.0, 3.0, 4.0, 5.0]] * 3


def test_plan_that_ranks_disagree_on_is_refused():
    def body(comm):
        error = outcome(lambda: comm.plan_allreduce_(np.zeros(2 + comm.rank)))
        return type(error), float(comm.allreduce(np.array(1.0)))

    settings = Settings(wait="sleep")
    assert run_communicators(2, body, settings=settings) == [(CollectiveMismatchError, 2.0)] * 2


# Making, splitting, freeing


@pytest.mark.parametrize("size", [1, 4, 7])
def test_split_orders_by_key(size):
    def body(comm):
        part = comm.split(comm.rank % 2, -comm.rank)
        assert part.engine is comm.engine
        return part.rank, part.size, part.allgather_obj(comm.rank)

    results = run_communicators(size, body)
    for rank, (part_rank, part_size, ranks) in enumerate(results):
        expected = sorted(range(rank % 2, size, 2), reverse=True)
        assert (part_size, ranks) == (len(expected), expected)
        assert expected[part_rank] == rank


def test_split_without_a_color_is_no_communicator():
    def body(comm):
        part = comm.split(None if comm.rank == 1 else 0)
        return None if part is None else (part.rank, part.size, part.allgather_obj(comm.rank))

    assert run_communicators(3, body) == [(0, 2, [0, 2]), None, (1, 2, [0, 2])]


def test_messages_of_duplicates_never_meet():
    def body(comm):
        other = comm.duplicate()
        first = comm.broadcast_async(np.full(3, float(comm.rank)), root=0)
        second = other.broadcast_async(np.full(3, comm.rank + 10.0), root=0)
        return second.wait(HANG_S).tolist(), first.wait(HANG_S).tolist()

    assert run_communicators(3, body) == [([10.0] * 3, [0.0] * 3)] * 3


def test_duplicate_with_other_settings():
    def body(comm):
        other = comm.duplicate(SETTINGS.replace(algorithm="ring"))
        return other.plan_allreduce_(np.zeros(4)).description, comm.plan_allreduce_(np.zeros(4)).description

    for other, own in run_communicators(2, body):
        assert "by ring" in other
        assert "by ring" not in own


def test_free_may_be_called_twice():
    def body(comm):
        comm.barrier()
        assert not comm.is_freed
        comm.free()
        comm.free()
        return comm.is_freed

    assert run_communicators(2, body) == [True, True]


@pytest.mark.parametrize("field", [{"segment_nbytes": 64}, {"check": False}, {"algorithm": "ring"}])
def test_different_settings_are_an_error_on_every_rank(field):
    def body(transport):
        settings = SETTINGS.replace(**field) if transport.rank == 1 else SETTINGS
        return outcome(lambda: Communicator(transport, settings=settings))

    results = run_ranks(3, body)
    assert all(isinstance(result, CollectiveMismatchError) for result in results)
    name = next(iter(field))
    assert all(f"MPITRAIN_{name.upper()}" in str(result) for result in results)
    assert len({str(result) for result in results}) == 1


def test_algorithm_of_the_settings_is_taken_where_none_is_named():
    def body(comm):
        chosen = comm.plan_allreduce_(np.zeros(4)).description
        named = comm.plan_allreduce_(np.zeros(4), algorithm="double_tree").description
        return chosen, named

    for chosen, named in run_communicators(2, body, settings=SETTINGS.replace(algorithm="halving_doubling")):
        assert chosen.endswith("by halving_doubling")
        assert named.endswith("by double_tree")


# Arrays


def test_array_of_no_dimensions():
    def body(comm):
        number = np.array(comm.rank + 1.0)
        gathered = comm.allgather(number)
        total = comm.allreduce(number)
        at_root = comm.gather(number, root=1)
        assert (at_root is None) == (comm.rank != 1)
        return total.shape, float(total), gathered.tolist(), comm.broadcast(number, root=2).shape

    assert run_communicators(3, body) == [((), 6.0, [1.0, 2.0, 3.0], ())] * 3


def test_tensor_that_requires_grad_is_reduced_outside_autograd():
    def body(comm):
        parameter = torch.full((3,), comm.rank + 1.0, requires_grad=True)
        result = comm.allreduce_(parameter)
        assert result is parameter
        copy = comm.allreduce(parameter)
        assert copy.grad_fn is None
        return parameter.tolist()

    assert run_communicators(2, body) == [[3.0] * 3] * 2


def test_strided_array_is_copied_where_a_new_one_is_returned():
    def body(comm):
        matrix = np.arange(12.0).reshape(3, 4) * (comm.rank + 1)
        return comm.allreduce(matrix[:, 1]).tolist()

    assert run_communicators(2, body) == [[3.0, 15.0, 27.0]] * 2


def test_read_only_array_is_fine_on_the_root_of_a_broadcast():
    def body(comm):
        array = np.full(4, 5.0) if comm.rank == 0 else np.zeros(4)
        array.flags.writeable = comm.rank != 0
        return comm.broadcast_(array, root=0).tolist()

    assert run_communicators(3, body) == [[5.0] * 4] * 3


def test_rows_may_be_numbers_of_any_kind():
    # A list of NumPy integers on one rank and of Python's on another is the same list.
    def body(comm):
        rows = [1, 2, 3]
        return comm.allgather(np.full(rows[comm.rank], comm.rank), rows=np.array(rows) if comm.rank else rows).tolist()

    assert run_communicators(3, body) == [[0, 1, 1, 2, 2, 2]] * 3


def test_splits_may_leave_rows_at_the_end_unsent():
    def body(comm):
        got, rows = comm.alltoall(np.arange(6) + 10 * comm.rank, splits=[1, 2])
        return got.tolist(), rows

    assert run_communicators(2, body) == [([0, 10], [1, 1]), ([1, 2, 11, 12], [2, 2])]


def test_barrier_waits_for_the_last_rank():
    come = []

    def body(comm):
        if comm.rank == 2:
            time.sleep(0.1)
        come.append(comm.rank)
        comm.barrier()
        return len(come)

    assert run_communicators(4, body) == [4] * 4


@pytest.mark.parametrize(("wait", "spins"), [("spin", True), ("sleep", False)])
def test_way_of_waiting_is_set(wait, spins):
    def body(comm):
        return comm.engine.spin_waiting, comm.engine.spin_background

    assert run_communicators(1, body, settings=Settings(wait=wait)) == [(spins, spins)]
