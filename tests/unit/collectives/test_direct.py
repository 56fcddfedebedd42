"""The direct algorithm and its pieces, with in-process ranks on pretended nodes."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest

from mpitrain.collectives import direct
from mpitrain.collectives.across import AcrossNodes
from mpitrain.collectives.direct import REDUCED, pipeline, shared_allreduce, staged_allreduce
from mpitrain.collectives.executor import Task
from mpitrain.collectives.node import Node
from mpitrain.collectives.progress import drive
from mpitrain.collectives.reduction import Reduction
from mpitrain.comm import ThreadTransport, Topology, run_ranks
from mpitrain.config import Settings
from mpitrain.errors import CommError
from mpitrain.memory import ReduceOp, ScratchPool, dtype_named
from tests.support.limits import HANG_S
from tests.support.ranks import outcome

SETTINGS = Settings(segment_nbytes=256)
CASES = [  # ranks, ranks per node
    (2, 2), (3, 3), (4, 4), (7, 7), (4, 2), (6, 3), (5, 2), (7, 3), (4, 3), (8, 2),
]  # fmt: skip


def group(transport: ThreadTransport, staging_nbytes: int) -> tuple[Node, AcrossNodes | None]:
    """Make the node and the crossing of this rank, as a communicator does."""
    topology = Topology.discover(transport)
    on_node = transport.split(topology.node_index, transport.rank)
    assert on_node is not None
    node = Node(on_node, staging_nbytes)
    if len(topology.nodes) == 1:
        return node, None
    num_slices = min(len(ranks) for ranks in topology.nodes)
    owns = topology.local_rank < num_slices
    crossing = transport.split(topology.local_rank if owns else None, topology.node_index)
    return node, AcrossNodes(crossing, num_slices, SETTINGS, ScratchPool())


def content(rank: int, count: int, storage: np.dtype[Any]) -> np.ndarray:
    """Different by rank and by index, and small enough that every sum is exact."""
    return ((np.arange(count) * (rank + 2) + 3 * rank) % 31).astype(storage)


def expected(size: int, count: int, name: str, op: ReduceOp) -> np.ndarray:
    parts = np.stack([content(rank, count, dtype_named(name).storage).astype(np.float64) for rank in range(size)])
    combined = {
        ReduceOp.SUM: parts.sum(0),
        ReduceOp.AVERAGE: parts.sum(0) / size,
        ReduceOp.MIN: parts.min(0),
        ReduceOp.MAX: parts.max(0),
    }[op]
    return combined.astype(dtype_named(name).storage)


@pytest.mark.parametrize(("size", "ranks_per_node"), CASES)
@pytest.mark.parametrize("count", [0, 1, 15, 1000, 5003])
@pytest.mark.parametrize(
    ("name", "op"), [("float32", ReduceOp.SUM), ("int64", ReduceOp.MAX), ("float64", ReduceOp.AVERAGE)]
)
def test_shared_and_staged_reduce(
    monkeypatch: pytest.MonkeyPatch, size: int, ranks_per_node: int, count: int, name: str, op: ReduceOp
) -> None:
    # Tiny pieces, so that many are under way.
    monkeypatch.setattr(direct, "_PIECE_NBYTES", 2048)
    monkeypatch.setattr(direct, "_BLOCK_NBYTES", 512)
    dtype = dtype_named(name)

    def run(transport: ThreadTransport) -> list[np.ndarray]:
        node, across = group(transport, 4 * 1024)
        reduction = Reduction(dtype, op, size)
        block = node.allocate(max(1, count * dtype.itemsize))
        assert block is not None
        buffers = block.typed(dtype.storage, 0, count)
        results = []
        for number in range(1, 4):
            buffers[node.rank][:] = content(transport.rank, count, dtype.storage)
            # A rank must not write into its buffer before all have read it: the end of the operation says so.
            drive(shared_allreduce(node, buffers, reduction, number, across), spin=False)
            results.append(buffers[node.rank].copy())
        ordinary = content(transport.rank, count, dtype.storage)
        drive(staged_allreduce(node, ordinary, reduction, 4, across), spin=False)
        return [*results, ordinary]

    want = expected(size, count, name, op)
    for results in run_ranks(size, run, ranks_per_node=ranks_per_node):
        for result in results:
            np.testing.assert_allclose(result, want, rtol=1e-15)


@pytest.mark.parametrize(("size", "ranks_per_node"), [(4, 4), (6, 3), (5, 2)])
def test_all_ranks_get_the_same_bits_in_every_run(size: int, ranks_per_node: int) -> None:
    dtype = dtype_named("float32")
    count = 3001

    def run(transport: ThreadTransport) -> list[bytes]:
        node, across = group(transport, 4 * 1024)
        random = np.random.default_rng(transport.rank).standard_normal(count).astype(np.float32)
        results = []
        for number in range(1, 4):
            array = random.copy()
            drive(
                staged_allreduce(node, array, Reduction(dtype, ReduceOp.SUM, size), number, across),
                spin=False,
            )
            results.append(array.tobytes())
        return results

    assert len({result for results in run_ranks(size, run, ranks_per_node=ranks_per_node) for result in results}) == 1


def test_half_precision_sums_round_as_float32_does() -> None:
    dtype = dtype_named("bfloat16")

    def run(transport: ThreadTransport) -> np.ndarray:
        node, across = group(transport, 4 * 1024)
        array = np.full(100, 0x3F80 + transport.rank, np.uint16)  # 1.0 and the next larger bfloat16
        drive(staged_allreduce(node, array, Reduction(dtype, ReduceOp.SUM, 2), 1, across), spin=False)
        return array

    for result in run_ranks(2, run):
        assert set(result.tolist()) == {0x4000}  # 2.0078125 rounds to the even neighbour, 2.0


def test_a_chain_begins_when_the_one_depth_places_before_has_ended():
    # What a chain takes by its number modulo the depth must not be in use. The first one takes longest.
    active: set[int] = set()

    def chain(number: int) -> Task[None]:
        assert not {other % 4 for other in active} & {number % 4}
        active.add(number)
        for _ in range(20 if number == 0 else number % 3):
            yield True
        active.remove(number)

    begun = []
    chains = (begun.append(number) or chain(number) for number in range(13))
    for _ in pipeline(chains, 4):
        assert len(active) <= 4
        assert 0 not in active or max(begun) < 4
    assert begun == list(range(13))
    assert not active


def test_a_rank_that_cannot_wait_for_the_last_phase_tells_the_others() -> None:
    # They may have read what it has changed since.
    reduction = Reduction(dtype_named("float32"), ReduceOp.SUM, 2)
    has_ended = threading.Event()

    def run(transport: ThreadTransport) -> list[BaseException | object]:
        node, across = group(transport, 4 * 1024)
        buffers = node.allocate(400).typed(np.dtype(np.float32), 0, 100)
        task = shared_allreduce(node, buffers, reduction, 1, across)
        if transport.rank:
            next(task)
            has_ended.wait(HANG_S)
            found = [outcome(lambda: drive(task, spin=False))]
        else:
            while not node.flags._own[node.flags._index(REDUCED, 1)]:
                next(task)
            task.close()
            found = []
            has_ended.set()
        # A later one is one like any other.
        return [*found, outcome(lambda: drive(shared_allreduce(node, buffers, reduction, 2, across), spin=False))]

    (last,), (error, other_last) = run_ranks(2, run)
    assert isinstance(error, CommError)
    assert last is None
    assert other_last is None
