"""Schedules run on numbers and strings, by a few lines that share nothing with the prover."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest

from mpitrain.schedules import ALGORITHMS, Algorithm, find_algorithm

SIZES = [1, 2, 3, 4, 5, 7, 8, 12, 13]
Buffers = list[list[Any]]


def run(
    algorithm: Algorithm, buffers: Buffers, combine: Callable[[Any, Any], Any], root: int, num_segments: int
) -> None:
    """Run all ranks in lockstep on `buffers[rank][chunk]`, in place."""
    size = len(buffers)
    ranks = [list(algorithm.rounds_of(rank, size, root=root, num_segments=num_segments)) for rank in range(size)]
    for rounds in zip(*ranks, strict=True):
        in_flight: dict[tuple[int, int], list[list[Any]]] = {}
        for rank, current in enumerate(rounds):
            for send in current.sends:
                copied = buffers[rank][send.start : send.stop]
                in_flight.setdefault((rank, send.peer), []).append(copied)
        for rank, current in enumerate(rounds):
            for receive in current.receives:
                arrived = in_flight[receive.peer, rank].pop(0)
                local = buffers[rank][receive.start : receive.stop]
                if receive.reduce:
                    arrived = [combine(a, b) for a, b in zip(local, arrived, strict=True)]
                assert len(arrived) == len(local)
                buffers[rank][receive.start : receive.stop] = arrived
        assert not any(in_flight.values())


def value(rank: int, chunk: int) -> int:
    return 1 + 7 * rank * rank + 1000 * chunk


def total(size: int, chunk: int) -> int:
    # 7 times the sum of the squares below `size`, by its closed form.
    return size * (1 + 1000 * chunk) + 7 * (size - 1) * size * (2 * size - 1) // 6


def algorithms_of(*collectives: str) -> list[Any]:
    return [
        pytest.param(algorithm, id=algorithm.qualified_name)
        for collective in collectives
        for algorithm in ALGORITHMS[collective].values()
    ]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("algorithm", algorithms_of("allreduce", "reduce_scatter", "reduce"))
def test_sums_are_right_where_they_must_be(algorithm: Algorithm, size: int) -> None:
    root, num_segments = size // 2, 3
    chunks = range(algorithm.num_chunks(size, num_segments))
    buffers = [[value(rank, chunk) for chunk in chunks] for rank in range(size)]
    run(algorithm, buffers, operator.add, root, num_segments)
    expected = [total(size, chunk) for chunk in chunks]
    match algorithm.collective:
        case "allreduce":
            assert buffers == [expected] * size
        case "reduce_scatter":
            assert [buffers[rank][rank] for rank in range(size)] == expected
        case "reduce":
            assert buffers[root] == expected


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("algorithm", algorithms_of("allgather", "gather", "broadcast", "scatter"))
def test_chunks_move_where_they_must_be(algorithm: Algorithm, size: int) -> None:
    root, num_segments = size - 1, 3
    chunks = range(algorithm.num_chunks(size, num_segments))
    full = [value(chunk + 3, chunk) for chunk in chunks]
    if algorithm.collective in {"allgather", "gather"}:
        buffers = [[full[chunk] if chunk == rank else None for chunk in chunks] for rank in range(size)]
    else:
        buffers = [full[:] if rank == root else [None] * len(full) for rank in range(size)]
    run(algorithm, buffers, operator.add, root, num_segments)
    match algorithm.collective:
        case "allgather" | "broadcast":
            assert buffers == [full] * size
        case "gather":
            assert buffers[root] == full
        case "scatter":
            assert [buffers[rank][rank] for rank in range(size)] == full


@pytest.mark.parametrize("size", SIZES)
def test_alltoall_transposes(size: int) -> None:
    buffers: Buffers = [[(rank, dest) for dest in range(size)] + [None] * size for rank in range(size)]
    for rank in range(size):
        buffers[rank][size + rank] = (rank, rank)
    run(find_algorithm("alltoall", "pairwise"), buffers, operator.add, 0, 1)
    for rank in range(size):
        assert buffers[rank][size:] == [(source, rank) for source in range(size)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("algorithm", algorithms_of("allreduce"))
def test_allreduce_gives_same_bits_on_all_ranks(algorithm: Algorithm, size: int) -> None:
    # Of these the sum depends on the order in almost every case.
    chunks = range(algorithm.num_chunks(size, 2))
    buffers = [[0.1 * 3.7**rank * (-1) ** (rank + chunk) for chunk in chunks] for rank in range(size)]
    run(algorithm, buffers, operator.add, 0, 2)
    assert all(buffer == buffers[0] for buffer in buffers)


@pytest.mark.parametrize("size", SIZES)
def test_reduce_binomial_keeps_order_for_root_0(size: int) -> None:
    buffers: Buffers = [[chr(ord("a") + rank)] for rank in range(size)]
    run(find_algorithm("reduce", "binomial"), buffers, operator.add, 0, 1)
    assert buffers[0] == ["abcdefghijklmnop"[:size]]
