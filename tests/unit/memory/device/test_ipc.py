"""Device memory that ranks share; here by ranks that are threads. `tests/mpi/test_device.py` has processes."""

from __future__ import annotations

import contextlib
import threading
import time

import numpy as np
import pytest

from mpitrain.collectives.reclaim import Reclaimer
from mpitrain.comm import run_ranks
from mpitrain.errors import UnavailableError
from mpitrain.memory import SharedDeviceArray, allocate_like, as_dtype, copy_of, flat_view
from mpitrain.memory.device import allocate_mapped_device, ipc, streams_of
from tests.support.fake_cupy import held_up, stand_in


@pytest.mark.parametrize("size", [1, 2, 3])
def test_all_ranks_see_the_memory_of_all(fake_cupy, size):
    def body(transport):
        rank = transport.rank
        block = allocate_mapped_device(rank, 40, 1, 0, transport.gather_everywhere)
        assert [view.get().tolist() for view in block.views] == [[0] * 40] * size
        transport.gather_everywhere(None)
        stream = streams_of(0).compute
        with stream:
            block.views[rank].fill(rank + 1)
        block.record(0, stream)
        transport.gather_everywhere(None)
        block.wait(0, stream)
        seen = [view.get(stream=stream).tolist() for view in block.views]
        let_go = block.holdings.close()
        transport.gather_everywhere(None)
        let_go()
        return seen

    expected = [[owner + 1] * 40 for owner in range(size)]
    assert run_ranks(size, body) == [expected] * size


def test_memory_is_zero_on_all_ranks_though_one_is_slow(fake_cupy, monkeypatch):
    memset = fake_cupy.cuda.runtime.memsetAsync

    def slow(*arguments):
        if threading.current_thread().name == "rank 1":
            time.sleep(0.1)
        memset(*arguments)

    monkeypatch.setattr(fake_cupy.cuda.runtime, "memsetAsync", slow)

    def body(transport):
        block = allocate_mapped_device(transport.rank, 40, 1, 0, transport.gather_everywhere)
        seen = [view.get().tolist() for view in block.views]
        let_go = block.holdings.close()
        transport.gather_everywhere(None)
        let_go()
        return seen

    assert run_ranks(2, body) == [[[0] * 40] * 2] * 2


def test_typed_parts_are_the_same_memory_on_all_ranks(fake_cupy):
    def body(transport):
        block = allocate_mapped_device(transport.rank, 64, 0, 0, transport.gather_everywhere)
        parts = block.typed(np.dtype(np.float32), 8, 3)
        with streams_of(0).compute as stream:
            parts[transport.rank][...] = 1.5
            stream.synchronize()
        transport.gather_everywhere(None)
        seen = [view.get().view(np.float32).tolist() for view in block.views]
        let_go = block.holdings.close()
        transport.gather_everywhere(None)
        let_go()
        return seen

    assert run_ranks(2, body) == [[[0, 0, 1.5, 1.5, 1.5, *[0] * 11]] * 2] * 2


def test_memory_is_made_and_used_while_older_streams_are_held_up(fake_cupy):
    before = streams_of(0)
    with held_up(fake_cupy, before.compute), held_up(fake_cupy, before.down):

        def body(transport):
            block = allocate_mapped_device(transport.rank, 16, 1, 0, transport.gather_everywhere)
            assert block.streams is not before
            stream = block.streams.compute
            with stream:
                block.views[transport.rank].fill(transport.rank + 1)
            block.record(0, stream)
            transport.gather_everywhere(None)
            block.wait(0, stream)
            return [view.get(stream=stream).tolist() for view in block.views]

        assert run_ranks(2, body) == [[[1] * 16, [2] * 16]] * 2


def test_memory_that_is_still_waited_for_is_kept_on_all_ranks(fake_cupy, monkeypatch, caplog):
    monkeypatch.setattr(ipc, "_PATIENCE_S", 0.1)

    def body(transport):
        block = allocate_mapped_device(transport.rank, 16, 1, 0, transport.gather_everywhere)
        transport.gather_everywhere(None)  # ranks that are threads may have streams in common
        with contextlib.ExitStack() as stack:
            if transport.rank == 1:
                stack.enter_context(held_up(fake_cupy, block.streams.compute))
            transport.gather_everywhere(None)
            # In a process of its own, rank 0 would have streams of its own.
            closed = block.holdings.close() if transport.rank == 1 else block.holdings._let_go
            reclaimer = Reclaimer(transport)
            reclaimer.free_together([lambda: closed, lambda: None])
            transport.gather_everywhere(None)
        return closed is False, hasattr(block.holdings.own, "memory")

    assert run_ranks(2, body) == [(False, True), (True, True)]
    assert "cuda:0 stay allocated, as the device waits for a rank that has failed" in caplog.text


def test_what_one_rank_lacks_is_raised_on_all():
    with stand_in(total_nbytes=4 << 20):

        def body(transport):
            # There is only room for what rank 1 asks for.
            nbytes = 64 if transport.rank else 16 << 20
            with pytest.raises(
                UnavailableError, match=r"^device memory: cannot be shared on this node \(device memory: out"
            ):
                allocate_mapped_device(transport.rank, nbytes, 1, 0, transport.gather_everywhere)

        run_ranks(2, body)


def test_ipc_that_is_not_supported_is_raised_on_all():
    with stand_in(can_export=False):

        def body(transport):
            with pytest.raises(UnavailableError, match=r"cannot be shared on this node \(cudaErrorNotSupported"):
                allocate_mapped_device(transport.rank, 64, 1, 0, transport.gather_everywhere)

        run_ranks(2, body)


def test_memory_that_is_not_the_peers_is_found_out(fake_cupy, monkeypatch):
    # Of two ranks in two processes, the other one's handle leads to this one's memory.
    runtime = fake_cupy.cuda.runtime
    own = {}

    def share(value):
        if isinstance(value, str):
            return [value, ""]
        own["export"] = value
        return [value, value._replace(process=("elsewhere", 1), mark=b"\1" * 16)]

    monkeypatch.setattr(runtime, "ipcOpenMemHandle", lambda handle: own["export"].address)
    monkeypatch.setattr(runtime, "ipcCloseMemHandle", lambda address: own.update(closed=address))
    with pytest.raises(UnavailableError, match=r"rank 0 of the node cannot map .* other bytes are mapped"):
        allocate_mapped_device(0, 64, 0, 0, share)
    assert own["closed"] == own["export"].address


def test_private_array_is_viewed_copied_and_cut(fake_cupy):
    array = SharedDeviceArray.private(as_dtype("float32"), (2, 3), 0)
    assert (array.is_shared, array.device, array.device_name) == (False, 0, "cuda:0")
    array.cupy()[1] = 2
    view = flat_view(array, writable=True)
    assert (view.device, view.shape, view.is_host, view.owner) == ("cuda:0", (2, 3), False, array)
    assert view.data.get().tolist() == [0, 0, 0, 2, 2, 2]
    assert copy_of(array).cupy().get().tolist() == [[0, 0, 0], [2, 2, 2]]
    assert allocate_like(array, 5).shape == (5,)
    part = array.part(as_dtype("float32"), 8, 3)
    assert part.cupy().get().tolist() == [0, 2, 2]
    with pytest.raises(TypeError, match=r"has no dtype bfloat16; use tensor\(\)"):
        SharedDeviceArray.private(as_dtype("bfloat16"), (3,), 0).cupy()
