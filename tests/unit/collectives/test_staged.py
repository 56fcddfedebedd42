"""Collectives on device arrays that pass through pinned memory, on the stand-in for CuPy, among threads.

The stand-in works off its queues late and out of order, so whatever is read before its event is done is wrong.
"""

from __future__ import annotations

import logging
import time
from types import SimpleNamespace

import numpy as np
import pytest

from mpitrain.collectives import Communicator
from mpitrain.collectives.direct import staged_allreduce
from mpitrain.collectives.gate import Gate, Gates
from mpitrain.collectives.layout import Layout, even_counts
from mpitrain.collectives.reduction import Reduction
from mpitrain.errors import CollectiveMismatchError
from mpitrain.memory import FlatArray, ReduceOp, dtype_named
from mpitrain.memory.device import Image
from mpitrain.schedules import ALGORITHMS
from tests.support.cases import CHECKS, Case, device_grid, run_cases
from tests.support.fake_cupy import stand_in
from tests.support.ranks import SETTINGS, outcome, run_communicators

# So small that what is exchanged has several pieces, which do not end where segments do.
SMALL_PIECES = SETTINGS.replace(
    shared_device_memory=False, device_piece_nbytes=64, segment_nbytes=48, staging_nbytes=1024
)
COLLECTIVES = [name for name in CHECKS if name != "barrier"]


@pytest.mark.parametrize("library", ["cupy", "mixed"])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("collective", COLLECTIVES)
def test_every_collective_on_device_arrays(fake_cupy, collective, size, library):
    def body(comm: Communicator) -> int:
        return run_cases(comm, collective, "auto", device_grid(collective, size, library))

    assert min(run_communicators(size, body, settings=SMALL_PIECES)) > 0
    assert fake_cupy._machine.machine.num_device_synchronizes == 0


@pytest.mark.parametrize("collective", ["allreduce", "broadcast"])
def test_every_schedule_takes_pieces_as_they_arrive(fake_cupy, collective):
    cases = [Case(count=501, library="cupy", form=form, op="average") for form in ("new", "in place", "async")]

    def body(comm: Communicator) -> int:
        return sum(run_cases(comm, collective, name, iter(cases)) for name in ALGORITHMS[collective])

    run_communicators(3, body, settings=SMALL_PIECES.replace(shared_memory=False))


class Relay:
    """An image of which two pieces arrive, and further ones only as all ranks give away those before."""

    def __init__(self, everybody, data, *, is_there=False):
        self.host = SimpleNamespace(flat=data)
        self.piece_count = 16
        self.given = []
        self._everybody = everybody
        self._is_there = is_there
        everybody.append(self)

    @property
    def num_arrived(self):
        least = min(sum(last - first for first, last in each.given) for each in self._everybody)
        return self.host.flat.size if self._is_there else min(least + 2 * self.piece_count, self.host.flat.size)

    def give(self, first, last):
        self.given.append((first, last))


def test_broadcast_sends_what_has_arrived():
    everybody, dtype = [], dtype_named("int64")

    def body(comm: Communicator) -> list[int]:
        data = np.arange(100) * (comm.rank == 0)
        # What the root gives away counts for nothing: only the last rank's pieces let the next one arrive.
        relay = Relay(everybody if comm.rank == 2 else [], data, is_there=comm.rank > 0)
        if comm.rank == 0:
            while not everybody:
                time.sleep(0.001)
            relay._everybody = everybody
        context = comm._context
        counts = even_counts(100, context.num_chunks("broadcast", "chain", data.nbytes))
        program = context.program("broadcast", "chain", Layout.packed(counts), dtype, nbytes=data.nbytes)
        call = comm._runner.call_of(0)._replace(gates=Gates([Gate(relay, writes=comm.rank > 0)], None))
        comm.engine.drive(context.execute(program, [data], dtype, call))
        return data.tolist()

    settings = SETTINGS.replace(segment_nbytes=64, shared_memory=False)
    assert run_communicators(3, body, settings=settings) == [list(range(100))] * 3


def test_direct_allreduce_reduces_what_has_arrived():
    everybody, dtype = [], dtype_named("int64")

    def body(comm: Communicator) -> list[int]:
        data = np.arange(100) * (comm.rank + 1)
        relay = Relay(everybody, data)
        while len(everybody) < comm.size:
            time.sleep(0.001)
        gate = Gate(relay, writes=True)
        reduction = Reduction(dtype, ReduceOp.SUM, comm.size)
        comm.engine.drive(staged_allreduce(comm._context.node, data, reduction, 1, None, gate=gate))
        assert sorted(relay.given) == [(first, min(first + 16, 100)) for first in range(0, 100, 16)]
        return data.tolist()

    settings = SETTINGS.replace(staging_nbytes=4 * 16 * 8)
    assert run_communicators(2, body, settings=settings) == [[3 * index for index in range(100)]] * 2


def test_plan_runs_many_times(fake_cupy):
    def body(comm: Communicator) -> None:
        array = fake_cupy.full(100, comm.rank + 1.0, np.float32)
        plan = comm.plan_allreduce_(array, op="average")
        for turn in range(4):
            assert (plan.run() if turn % 2 else plan.start().wait()) is array
            array += 1 + comm.rank
        assert array.get().tolist() == [1.5 + 4 * 1.5 - (0.5 - comm.rank)] * 100

    run_communicators(2, body, settings=SMALL_PIECES)


def test_work_of_the_caller_is_not_waited_for_on_other_streams(fake_cupy):
    """The caller's current stream is followed, in whatever thread the operation is advanced."""

    def body(comm: Communicator) -> None:
        stream = fake_cupy.cuda.Stream(non_blocking=True)
        with stream:
            array = fake_cupy.zeros(1000, np.int64)
            for _ in range(20):
                array += comm.rank + 1
            handle = comm.allreduce_async_(array)
            assert "staged through pinned memory" in handle.description
            handle.wait()
            assert set(array.get().tolist()) == {60}

    run_communicators(2, body, settings=SMALL_PIECES)


@pytest.mark.parametrize("verb", ["allreduce_", "broadcast_"])
def test_bfloat16(fake_cupy, verb):
    dtype = dtype_named("bfloat16")

    def body(comm: Communicator) -> list[int]:
        one_and_two = fake_cupy.full(100, (0x3F80, 0x4000)[comm.rank], np.uint16)
        getattr(comm, verb)(FlatArray(one_and_two, dtype, (100,), "cuda:0", one_and_two))
        return sorted(set(one_and_two.tolist()))

    assert run_communicators(2, body, settings=SMALL_PIECES) == [[0x4040 if verb == "allreduce_" else 0x3F80]] * 2


def test_different_things_are_an_error_on_all_ranks(fake_cupy):
    def body(comm: Communicator) -> None:
        array = fake_cupy.ones(3 + comm.rank)
        with pytest.raises(CollectiveMismatchError, match="different things"):
            comm.allreduce(array)
        assert comm.allreduce(fake_cupy.ones(3)).tolist() == [2, 2, 2]

    run_communicators(2, body)


def test_array_on_the_device_of_another_rank():
    with stand_in(num_devices=2) as cupy:

        def body(comm: Communicator) -> object:
            with cupy.cuda.Device(0):
                return outcome(lambda: comm.allreduce(cupy.ones(3)))

        _, error = run_communicators(2, body)
    assert isinstance(error, ValueError)
    assert str(error) == (
        "array: must be on this rank's device, got cuda:0 where local rank 1 has cuda:1; "
        "move it, and call torch.cuda.set_device(1) before making tensors"
    )


def test_rank_0_says_once_that_arrays_are_staged(fake_cupy, caplog):
    def body(comm: Communicator) -> None:
        for _ in range(3):
            comm.allreduce(fake_cupy.ones(3))

    with caplog.at_level(logging.INFO, "mpitrain"):
        run_communicators(2, body)
    assert [record.message for record in caplog.records] == [
        "device arrays are staged through pinned memory: ranks are threads"
    ]


@pytest.mark.parametrize("shared_memory", [True, False])
@pytest.mark.parametrize("verb", ["allreduce", "allgather", "broadcast", "reduce_scatter", "alltoall", "gather"])
def test_results_leave_in_parts_and_every_element_once(fake_cupy, monkeypatch, verb, shared_memory):
    given = {}
    give = Image.give

    def record(self, first, last):
        given.setdefault(id(self), (self, []))[1].extend(range(first, last))
        give(self, first, last)
        parts.append((id(self), last - first))

    parts = []
    monkeypatch.setattr(Image, "give", record)

    def body(comm: Communicator) -> int:
        array = fake_cupy.full(600, comm.rank, np.int64)
        result = getattr(comm, f"{verb}_async")(array).wait()
        result = result[0] if verb == "alltoall" else result
        return 0 if result is None or (verb == "broadcast" and comm.rank == 0) else result.size

    sizes = run_communicators(2, body, settings=SMALL_PIECES.replace(shared_memory=shared_memory))
    wanted = sorted(size for size in sizes if size)
    found = sorted(len(elements) for _, elements in given.values() if elements)
    assert found == wanted
    for image, elements in given.values():
        assert sorted(elements) == list(range(image.host.flat.size))
    if verb != "reduce_scatter" or shared_memory:
        assert max(nbytes for _, nbytes in parts) < max(wanted)


def test_rank_that_is_alone_copies_nothing(fake_cupy, monkeypatch):
    def fail(*arguments, **options):
        raise AssertionError("no image is needed")

    monkeypatch.setattr("mpitrain.collectives.staged.Image", fail)

    def body(comm: Communicator) -> None:
        for verb in ("allreduce", "allgather", "broadcast", "reduce", "reduce_scatter", "gather"):
            options = {"op": "average"} if "reduce" in verb else {}
            assert getattr(comm, verb)(fake_cupy.arange(5), **options).tolist() == [0, 1, 2, 3, 4]

    run_communicators(1, body)


@pytest.mark.parametrize("size", [3, 4])
def test_several_nodes(fake_cupy, size):
    """Slices of what has arrived cross the nodes, and come back."""
    cases = [Case(count=501, library=library, form=form) for library in ("cupy", "mixed") for form in ("new", "async")]

    def body(comm: Communicator) -> None:
        for collective, algorithm in (("allreduce", "hierarchical"), ("allreduce", "auto"), ("allgather", "auto")):
            run_cases(comm, collective, algorithm, iter(cases))

    run_communicators(size, body, settings=SMALL_PIECES, ranks_per_node=2)


def test_device_without_room_for_the_result_is_an_error_on_all_ranks():
    with stand_in(total_nbytes=12 << 20) as cupy:

        def body(comm: Communicator) -> tuple[object, list[float]]:
            array = cupy.full(5 << 18, comm.rank, np.float32)
            error = outcome(lambda: comm.allreduce(array))
            return error, comm.allreduce_(array)[:2].tolist()

        answers = run_communicators(2, body)
    for error, result in answers:
        assert isinstance(error, MemoryError)
        assert str(error).startswith("copy: out of memory on the device, got")
        assert "use smaller buckets" in str(error)
        assert result == [1, 1]
