from __future__ import annotations

import time

import numpy as np
import pytest

from mpitrain.collectives.agreement import _ranges
from mpitrain.config import Settings
from mpitrain.errors import CollectiveError, CollectiveMismatchError
from tests.support.limits import HANG_S
from tests.support.ranks import SETTINGS, outcome, run_communicators

torch = pytest.importorskip("torch")


def zeros(*shape, dtype=np.float32):
    return np.zeros(shape, dtype)


# What rank `odd` calls, and what all others call.
MISMATCHES = {
    "shape": (
        lambda comm, form: form(comm, "allreduce", zeros(5)),
        lambda comm, form: form(comm, "allreduce", zeros(6)),
    ),
    "dimensions": (
        lambda comm, form: form(comm, "allreduce", zeros(2, 3)),
        lambda comm, form: form(comm, "allreduce", zeros(6)),
    ),
    "dtype": (
        lambda comm, form: form(comm, "allreduce", zeros(5, dtype=np.int64)),
        lambda comm, form: form(comm, "allreduce", zeros(5, dtype=np.float64)),
    ),
    "op": (
        lambda comm, form: form(comm, "allreduce", zeros(5), op="min"),
        lambda comm, form: form(comm, "allreduce", zeros(5), op="max"),
    ),
    "algorithm": (
        lambda comm, form: form(comm, "allreduce", zeros(50), algorithm="ring"),
        lambda comm, form: form(comm, "allreduce", zeros(50), algorithm="double_tree"),
    ),
    "root": (
        lambda comm, form: form(comm, "broadcast", zeros(5), root=0),
        lambda comm, form: form(comm, "broadcast", zeros(5), root=1),
    ),
    "collective": (
        lambda comm, form: form(comm, "barrier"),
        lambda comm, form: form(comm, "allreduce", zeros(5)),
    ),
    "rows": (
        lambda comm, form: form(comm, "allgather", zeros(2)),
        lambda comm, form: form(comm, "allgather", zeros(3)),
    ),
    "splits": (
        lambda comm, form: form(comm, "alltoall", zeros(comm.size), splits=[1] * comm.size),
        lambda comm, form: form(comm, "alltoall", zeros(comm.size)),
    ),
    "row shape of alltoall": (
        lambda comm, form: form(comm, "alltoall", zeros(comm.size, 2)),
        lambda comm, form: form(comm, "alltoall", zeros(comm.size, 3)),
    ),
    "part": (
        lambda comm, form: form(comm, "scatter", zeros(comm.size * 2) if comm.rank == 0 else None, zeros(2)),
        lambda comm, form: form(comm, "scatter", zeros(comm.size * 3) if comm.rank == 0 else None, zeros(3)),
    ),
    "gathered": (
        lambda comm, form: form(comm, "gather", zeros(2)),
        lambda comm, form: form(comm, "reduce", zeros(2)),
    ),
    "reduce_scatter": (
        lambda comm, form: form(comm, "reduce_scatter", zeros(8, 1)),
        lambda comm, form: form(comm, "reduce_scatter", zeros(8, 2)),
    ),
}


def blocking(comm, verb, *arguments, **options):
    return getattr(comm, verb)(*arguments, **options)


def asynchronous(comm, verb, *arguments, **options):
    return getattr(comm, verb + "_async")(*arguments, **options).wait(HANG_S)


def still_usable(comm):
    return float(comm.allreduce(np.array([1.0]))[0]) == comm.size


@pytest.mark.parametrize("odd", [0, 2])
@pytest.mark.parametrize("form", [blocking, asynchronous])
@pytest.mark.parametrize("what", MISMATCHES)
def test_mismatch_is_an_error_on_every_rank(what, form, odd):
    odd_call, even_call = MISMATCHES[what]

    def body(comm):
        error = outcome(lambda: (odd_call if comm.rank == odd else even_call)(comm, form))
        return error, still_usable(comm)

    results = run_communicators(3, body)
    messages = {str(error) for error, _ in results}
    assert all(type(error) is CollectiveMismatchError for error, _ in results)
    assert all(usable for _, usable in results)
    # The same words on every rank, and they name the one that differs.
    assert len(messages) == 1
    message = messages.pop()
    assert f"ranks {odd}: " in message
    assert len(message.splitlines()) == 3


def test_library_may_differ():
    def body(comm):
        array = torch.ones(4) if comm.rank else np.ones(4, np.float32)
        return comm.allreduce(array).tolist()

    assert run_communicators(3, body) == [[3.0] * 4] * 3


# Calls that are wrong by themselves, and the error of the rank that makes them.
MISTAKES = {
    "op": (ValueError, lambda comm, form: form(comm, "allreduce", zeros(3), op="median")),
    "op of the training layers": (
        ValueError,
        lambda comm, form: form(comm, "reduce_scatter", zeros(3), op="adasum"),
    ),
    "parts": (ValueError, lambda comm, form: form(comm, "allreduce", zeros(3), op="adasum", parts=[1, 1])),
    "parts of a sum": (ValueError, lambda comm, form: form(comm, "allreduce", zeros(3), parts=[3])),
    "algorithm of adasum": (
        ValueError,
        lambda comm, form: form(comm, "allreduce", zeros(3), op="adasum", algorithm="ring"),
    ),
    "adasum of dtype": (
        TypeError,
        lambda comm, form: form(comm, "allreduce", zeros(3, dtype=np.int64), op="adasum"),
    ),
    "op of dtype": (
        TypeError,
        lambda comm, form: form(comm, "allreduce", zeros(3, dtype=np.bool_), op="average"),
    ),
    "dtype": (TypeError, lambda comm, form: form(comm, "allreduce", np.array(["text"]))),
    "kind": (TypeError, lambda comm, form: form(comm, "allreduce", [1.0, 2.0])),
    "strides": (ValueError, lambda comm, form: form(comm, "allgather", zeros(4, 4)[:, 1])),
    "algorithm": (ValueError, lambda comm, form: form(comm, "allreduce", zeros(3), algorithm="bogus")),
    "native": (ValueError, lambda comm, form: form(comm, "allreduce", zeros(3), algorithm="native")),
    "root": (ValueError, lambda comm, form: form(comm, "broadcast", zeros(3), root=comm.size)),
    "negative root": (ValueError, lambda comm, form: form(comm, "reduce", zeros(3), root=-1)),
    "root of no int": (ValueError, lambda comm, form: form(comm, "gather", zeros(3), root="0")),
    "rows": (ValueError, lambda comm, form: form(comm, "allgather", zeros(3), rows=[3])),
    "no dimension": (ValueError, lambda comm, form: form(comm, "reduce_scatter", np.array(1.0))),
    "nothing to cut": (ValueError, lambda comm, form: form(comm, "alltoall", np.array(1.0))),
    "indivisible": (ValueError, lambda comm, form: form(comm, "alltoall", zeros(comm.size + 1))),
    "splits": (ValueError, lambda comm, form: form(comm, "alltoall", zeros(3), splits=[9] * comm.size)),
    "negative split": (ValueError, lambda comm, form: form(comm, "alltoall", zeros(3), splits=[-1, 1, 1])),
    "part": (ValueError, lambda comm, form: form(comm, "scatter", zeros(5), zeros(2), root=comm.rank)),
    "out": (TypeError, lambda comm, form: form(comm, "scatter", None, None, root=1 - comm.rank % 2)),
}


@pytest.mark.parametrize("form", [blocking, asynchronous])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_of_one_rank_is_an_error_on_every_rank(mistake, form):
    kind, call = MISTAKES[mistake]

    def body(comm):
        if comm.rank == 1:
            error = outcome(lambda: call(comm, form))
        else:
            error = outcome(lambda: form(comm, "allreduce", zeros(3)))
        return error, still_usable(comm)

    results = run_communicators(3, body)
    assert type(results[1][0]) is kind
    for rank in (0, 2):
        assert type(results[rank][0]) is CollectiveMismatchError
        assert f"ranks 1: cannot call: {kind.__name__}" in str(results[rank][0])
    assert all(usable for _, usable in results)


@pytest.mark.parametrize("form", [blocking, asynchronous])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_of_all_ranks_is_everybodys_own_error(mistake, form):
    kind, call = MISTAKES[mistake]
    for settings in (SETTINGS, Settings(wait="sleep", check=False)):
        results = run_communicators(
            2,
            lambda comm: (outcome(lambda: call(comm, form)), still_usable(comm)),
            settings=settings,
        )
        # Where the mistake depends on the rank, the messages may differ, but nobody is left alone.
        assert all(type(error) is kind for error, _ in results)
        assert all(usable for _, usable in results)


def test_unexpected_error_of_one_rank_is_an_error_on_every_rank():
    class Sly:
        @property
        def __array_interface__(self):
            raise ZeroDivisionError("sly")

    def body(comm):
        return outcome(lambda: comm.allreduce(Sly() if comm.rank == 0 else zeros(2))), still_usable(comm)

    results = run_communicators(3, body)
    assert isinstance(results[0][0], ZeroDivisionError)
    assert all(isinstance(error, CollectiveMismatchError) for error, _ in results[1:])
    assert all(usable for _, usable in results)


def test_mismatch_is_an_error_of_the_handle_and_not_of_the_start():
    def body(comm):
        handle = comm.allreduce_async(zeros(2 + comm.rank))
        other = comm.allreduce_async(zeros(7))
        error = outcome(handle.wait)
        return type(error), other.wait().shape

    assert run_communicators(2, body) == [(CollectiveMismatchError, (7,))] * 2


def test_nothing_is_changed_by_a_mismatch():
    def body(comm):
        array = np.arange(4.0) + comm.rank
        with pytest.raises(CollectiveMismatchError):
            comm.allreduce_(array, op="sum" if comm.rank else "max")
        return array.tolist()

    assert run_communicators(2, body) == [[0, 1, 2, 3], [1, 2, 3, 4]]


def test_long_and_foreign_descriptions_are_cut_and_still_compared():
    def body(comm):
        rows = [1] * comm.size
        array = np.zeros((1,) * 20 + (comm.rank + 1,), np.float32)
        with pytest.raises(CollectiveMismatchError) as caught:
            comm.allgather(array, rows=rows)
        return str(caught.value)

    messages = run_communicators(3, body)
    assert len(set(messages)) == 1
    assert len(messages[0].splitlines()) == 4


def test_ranks_are_listed_as_ranges():
    assert _ranges([0]) == "0"
    assert _ranges([0, 1, 2, 5]) == "0-2, 5"
    assert _ranges([1, 3, 4]) == "1, 3-4"


def test_check_can_be_switched_off():
    counts = []

    def body(comm):
        isend = comm.transport.isend

        def counting(*arguments):
            counts.append(comm.rank)
            return isend(*arguments)

        comm.transport.isend = counting
        comm.broadcast_(zeros(4), root=0, algorithm="binomial")

    run_communicators(2, body, settings=Settings(wait="sleep", check=False))
    assert len(counts) == 1
    # On two nodes, as ranks of one node agree in shared memory, without messages.
    run_communicators(2, body, ranks_per_node=1)
    assert len(counts) > 2


def test_late_rank_does_not_hurt():
    def body(comm):
        time.sleep(0.05 * comm.rank)
        return float(comm.allreduce(np.array(1.0)))

    assert run_communicators(3, body) == [3.0] * 3


FORMS_THAT_DO_NOT_MEET = {
    "array": (lambda comm: comm.allreduce(np.ones(5)), lambda comm: comm.allreduce_async(np.ones(5))),
    "large array": (
        lambda comm: comm.allreduce_(np.ones(300_000)),
        lambda comm: comm.allreduce_async_(np.ones(300_000)),
    ),
    "rows": (lambda comm: comm.allgather(np.ones(5)), lambda comm: comm.allgather_async(np.ones(5))),
    "barrier": (lambda comm: comm.barrier(), lambda comm: comm.barrier_async()),
    "broadcast": (
        lambda comm: comm.broadcast(np.ones(5), root=1),
        lambda comm: comm.broadcast_async(np.ones(5), root=1),
    ),
}


@pytest.mark.parametrize("what", FORMS_THAT_DO_NOT_MEET)
@pytest.mark.parametrize(("size", "ranks_per_node"), [(2, None), (4, None), (3, 2)])
def test_a_blocking_form_does_not_meet_an_asynchronous_one(what, size, ranks_per_node):
    blocking, asynchronous = FORMS_THAT_DO_NOT_MEET[what]

    def body(comm):
        for _ in range(3):
            blocking(comm)
            asynchronous(comm).wait(HANG_S)
        return outcome(lambda: asynchronous(comm).wait(HANG_S) if comm.rank == 1 else blocking(comm))

    errors = run_communicators(size, body, ranks_per_node=ranks_per_node)
    assert all(isinstance(error, CollectiveError) for error in errors), errors
    assert all("asynchronous" in str(error) for error in errors)


@pytest.mark.parametrize("what", FORMS_THAT_DO_NOT_MEET)
def test_a_blocking_form_does_not_meet_the_one_after_an_asynchronous_one(what):
    blocking, asynchronous = FORMS_THAT_DO_NOT_MEET[what]

    def body(comm):
        for _ in range(2):
            blocking(comm)
        # Rank 1 comes to its next call, which waits, while the others wait in the one before.
        handle = asynchronous(comm) if comm.rank == 1 else None
        errors = [outcome(lambda: blocking(comm))]
        return errors + ([outcome(lambda: handle.wait(HANG_S))] if handle else [])

    for errors in run_communicators(3, body):
        assert all(isinstance(error, CollectiveError) for error in errors), errors
        assert all("asynchronous form" in str(error) for error in errors)
