"""Named operations on device arrays, on the stand-in for CuPy, beside ranks whose arrays lie on the host."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import pytest

from mpitrain.collectives import Communicator
from mpitrain.collectives.staged import StagedRun
from mpitrain.comm import Transport, run_ranks
from mpitrain.config import Settings
from mpitrain.errors import CollectiveMismatchError
from mpitrain.negotiation import Negotiator
from tests.support.limits import HANG_S

SETTINGS = Settings(wait="sleep", device_piece_nbytes=64, fusion_nbytes=1024)


def run(size: int, function: Any) -> list[Any]:
    def body(transport: Transport) -> Any:
        comm = Communicator(transport, settings=SETTINGS)
        try:
            return function(Negotiator(comm))
        finally:
            comm.engine.close()

    return run_ranks(size, body)


@pytest.fixture(params=["devices", "one on the host"])
def library_of(request, fake_cupy):
    """Return the library of a rank's arrays."""
    return lambda rank: np if rank == 1 and request.param == "one on the host" else fake_cupy


@pytest.mark.parametrize("in_place", [False, True])
def test_allreduces_of_several_arrays_in_any_order(library_of, in_place):
    def body(negotiator):
        rank, library = negotiator.comm.rank, library_of(negotiator.comm.rank)
        handles = {}
        for name in ("a", "b", "c")[:: 1 if rank else -1]:
            arrays = [library.full(50, rank + 1, np.float32), library.full((3, 5), rank, np.int64)]
            handles[name] = (
                arrays,
                negotiator.start(name, "allreduce", arrays, op="sum", prescale=2.0, in_place=in_place),
            )
        for arrays, handle in handles.values():
            results = handle.wait(HANG_S)
            assert [type(result) for result in results] == [library.ndarray] * 2
            assert [result.shape for result in results] == [(50,), (3, 5)]
            assert results[0].tolist() == [12.0] * 50
            assert results[1].tolist() == [[6] * 5] * 3
            assert all((result is array) == in_place for result, array in zip(results, arrays, strict=True))
            if not in_place:
                assert arrays[0].tolist() == [rank + 1] * 50

    run(3, body)


def test_average_of_the_callers_own_stream(fake_cupy):
    """What the caller has queued on its stream comes first, in whatever thread the operation runs."""

    def body(negotiator):
        with fake_cupy.cuda.Stream(non_blocking=True):
            array = fake_cupy.zeros(300, np.float16)
            for _ in range(10):
                array += 1 + negotiator.comm.rank
            handle = negotiator.start("x", "allreduce", [array], op="average")
            assert not handle.done
            (result,) = handle.wait(HANG_S)
            assert result.tolist() == [15.0] * 300

    run(2, body)


def test_other_collectives(library_of):
    def body(negotiator):
        rank, library = negotiator.comm.rank, library_of(negotiator.comm.rank)

        def of(collective, array, **details):
            (result,) = negotiator.start(collective, collective, [array], **details).wait(HANG_S)
            return result

        gathered, rows = of("allgather", library.full((rank + 1, 2), rank, np.int32))
        assert (rows, gathered.tolist()) == ([1, 2], [[0, 0], [1, 1], [1, 1]])
        assert of("broadcast", library.full(40, rank, np.uint8), root=1).tolist() == [1] * 40
        exchanged, rows = of("alltoall", library.full(3, rank, np.int64), splits=(1, 2))
        assert (rows, exchanged.tolist()) == ([1 + rank] * 2, [0] * (1 + rank) + [1] * (1 + rank))
        assert of("reduce_scatter", library.full(5, rank + 1.0), op="sum").tolist() == [3.0] * (3 - rank)

    run(2, body)


@pytest.mark.parametrize("kind", [MemoryError, KeyboardInterrupt])
def test_a_copy_that_fails_on_one_rank_is_an_error_on_all(fake_cupy, monkeypatch, kind):
    poor = []
    has_arrived = StagedRun.has_arrived.fget

    def lacking(run):
        if run in poor:
            raise kind("the copy failed")
        return has_arrived(run)

    def body(negotiator):
        stage = negotiator.comm.devices.stage

        def staged(*arguments, **options):
            run = stage(*arguments, **options)
            if negotiator.comm.rank == 1:
                poor.append(run)
            return run

        monkeypatch.setattr(negotiator.comm.devices, "stage", staged)
        with pytest.raises((CollectiveMismatchError, kind), match="the copy failed"):
            negotiator.start("x", "allreduce", [fake_cupy.ones(30)], op="sum").wait(HANG_S)
        monkeypatch.setattr(negotiator.comm.devices, "stage", stage)
        (result,) = negotiator.start("x", "allreduce", [fake_cupy.ones(30)], op="sum").wait(HANG_S)
        assert result.tolist() == [3.0] * 30

    monkeypatch.setattr(StagedRun, "has_arrived", property(lacking))
    run(3, body)


@contextlib.contextmanager
def held(fake_cupy):
    """Let no copy arrive within the block."""
    machine = fake_cupy._machine.machine
    machine.hold(True)
    try:
        yield
    finally:
        machine.hold(False)


def test_a_name_is_in_flight_while_its_array_is_copied(fake_cupy):
    def body(negotiator):
        ones = [fake_cupy.ones(30)]
        with contextlib.ExitStack() as stack:
            if negotiator.comm.rank == 1:
                stack.enter_context(held(fake_cupy))
                first = negotiator.start("x", "allreduce", ones, op="sum")
                for arrays in (ones, [np.ones(30)]):
                    with pytest.raises(ValueError, match="same name"):
                        negotiator.start("x", "allreduce", arrays, op="sum")
                # It is no refusal: that was an error of this rank's own.
                negotiator.refuse("x", "allreduce", "nothing is said")
        if negotiator.comm.rank == 0:
            first = negotiator.start("x", "allreduce", ones, op="sum")
        negotiator.await_name("x")
        second = negotiator.start("x", "allreduce", ones, op="max")
        assert first.wait(HANG_S)[0].tolist() == [2.0] * 30
        assert second.wait(HANG_S)[0].tolist() == [1.0] * 30

    run(2, body)


def test_a_name_is_free_when_the_copy_could_not_begin(fake_cupy, monkeypatch):
    def body(negotiator):
        def interrupted(*_arguments, **_options):
            raise KeyboardInterrupt

        for owner, name in ((negotiator.comm.devices, "stage"), (negotiator.comm.engine, "start")):
            with monkeypatch.context() as patched:
                patched.setattr(owner, name, interrupted)
                with pytest.raises(KeyboardInterrupt):
                    negotiator.start("x", "allreduce", [fake_cupy.ones(30)], op="sum")
        assert not negotiator._in_flight.holds("x")
        (result,) = negotiator.start("x", "allreduce", [fake_cupy.ones(30)], op="sum").wait(HANG_S)
        assert result.tolist() == [1.0] * 30

    run(1, body)


def test_what_was_started_before_a_rank_joins_takes_part(fake_cupy):
    def body(negotiator):
        rank = negotiator.comm.rank
        handle = negotiator.start("x", "allreduce", [fake_cupy.full(3000, rank + 1.0)], op="sum")
        joined = negotiator.join(lambda step: None)
        assert handle.wait(HANG_S)[0].tolist() == [3.0] * 3000
        joined.wait(HANG_S)

    run(2, body)


def test_different_shapes_are_an_error_on_all_ranks(fake_cupy):
    def body(negotiator):
        handle = negotiator.start("x", "allreduce", [fake_cupy.ones(3 + negotiator.comm.rank)], op="sum")
        with pytest.raises(CollectiveMismatchError):
            handle.wait(HANG_S)

    run(2, body)
