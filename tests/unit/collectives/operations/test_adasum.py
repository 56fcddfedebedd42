"""Adasum on real buffers against its definition: sizes, dtypes, parts, segments, and vectors that are special."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from mpitrain.config import Settings
from mpitrain.errors import CollectiveMismatchError
from mpitrain.memory import DTYPES, add_weighted, inner_products
from tests.support.adasum import adasum
from tests.support.cases import make, read
from tests.support.ranks import outcome, run_communicators

pytest.importorskip("torch")

# A half of 1000 float32 becomes more than 60 messages.
TINY = Settings(wait="sleep", segment_nbytes=32)
# Relative to what is brought, as each level rounds to the dtype.
TOLERANCES = {"float64": 1e-14, "float32": 1e-6, "float16": 5e-3, "bfloat16": 4e-2}


def brought(rank: int, count: int) -> np.ndarray:
    """Gradients that share a direction, so that the weights are far from those of a sum and of an average."""
    index = np.arange(count)
    return np.sin(index * 0.37) * (1 + rank % 3) + np.cos(index * (rank + 1) * 0.9 + rank)


def reference(size: int, counts: list[int], dtype: str) -> np.ndarray:
    vectors = [read(make(brought(rank, sum(counts)), dtype)) for rank in range(size)]
    bounds = np.cumsum([0, *counts])
    pairs = itertools.pairwise(bounds)
    return np.concatenate([np.empty(0), *(adasum([vector[b:e] for vector in vectors]) for b, e in pairs)])


def assert_close(got: np.ndarray, expected: np.ndarray, dtype: str) -> None:
    np.testing.assert_allclose(got.astype(np.float64), expected, rtol=0, atol=TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 6, 7, 8, 13])
def test_equals_its_definition(size, dtype):
    for count in (0, 1, size - 1, 2 * size + 1, 1000):

        def body(comm, count=count):
            array = make(brought(comm.rank, count), dtype)
            kept = read(array).tobytes()
            result = comm.allreduce(array, op="adasum")
            assert read(array).tobytes() == kept
            assert comm.allreduce_async_(array, op="adasum").wait() is array
            assert read(array).tobytes() == read(result).tobytes()
            return read(result)

        results = run_communicators(size, body, settings=TINY, rendezvous=size % 2 == 0)
        assert len({result.tobytes() for result in results}) == 1
        assert_close(results[0], reference(size, [count], dtype), dtype)


@hypothesis_settings(max_examples=25)
@given(
    size=st.integers(1, 6),
    counts=st.lists(st.integers(0, 20), max_size=8),
    dtype=st.sampled_from(["float64", "float32"]),
)
def test_parts_are_combined_each_by_itself(size, counts, dtype):
    def body(comm):
        plan = comm.plan_allreduce_(array := make(brought(comm.rank, sum(counts)), dtype), op="adasum", parts=counts)
        first = np.array(plan.start().wait())
        array[:] = make(brought(comm.rank, sum(counts)), dtype)
        assert plan.start().wait().tobytes() == first.tobytes()
        return first

    for result in run_communicators(size, body, settings=TINY):
        assert_close(result, reference(size, counts, dtype), dtype)


def test_orthogonal_vectors_are_added_and_equal_ones_averaged():
    def body(comm):
        unit = np.zeros(4)
        unit[comm.rank] = comm.rank + 1.0
        orthogonal = comm.allreduce(unit, op="adasum")
        equal = comm.allreduce(np.array([3.0, -4.0, 5.0]), op="adasum")
        return orthogonal.tolist(), equal.tolist()

    assert run_communicators(4, body) == [([1.0, 2.0, 3.0, 4.0], [3.0, -4.0, 5.0])] * 4


@pytest.mark.parametrize("zero", [0, 1, 2])
def test_a_rank_of_zeros_changes_nothing(zero):
    def body(comm):
        mine = np.zeros(5) if comm.rank == zero else brought(comm.rank, 5)
        return comm.allreduce(mine, op="adasum")

    others = [brought(rank, 5) for rank in range(3) if rank != zero]
    for result in run_communicators(3, body):
        np.testing.assert_allclose(result, adasum(others), rtol=1e-14)


def test_overflow_and_nan_are_seen_by_every_rank():
    def body(comm):
        mine = brought(comm.rank, 9)
        mine[4] = np.inf if comm.rank == 1 else 1.0
        return comm.allreduce(mine.astype(np.float16), op="adasum")

    results = run_communicators(3, body)
    assert not np.isfinite(results[0]).all()
    assert len({result.tobytes() for result in results}) == 1


def test_ranks_with_other_parts_are_told():
    def body(comm):
        parts = [1, 3] if comm.rank else [2, 2]
        return outcome(lambda: comm.allreduce(np.ones(4), op="adasum", parts=parts))

    assert all(isinstance(error, CollectiveMismatchError) for error in run_communicators(2, body))


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_arithmetic_of_long_vectors_is_done_in_float64(dtype):
    # In float32 the small products would be lost beside the large one.
    count = 3 * 8192 + 5
    values = np.full(count, 2.0**-12)
    values[0] = 64.0
    first, second = (read_storage(make(values * factor, dtype)) for factor in (1.0, 2.0))
    both, squared, other_squared = inner_products(first, second, DTYPES[dtype])
    exact = 4096.0 + (count - 1) * 2.0**-24
    assert (both, squared, other_squared) == (2 * exact, exact, 4 * exact)
    add_weighted(first, 0.5, second, 0.25, DTYPES[dtype])
    assert first.tobytes() == read_storage(make(values, dtype)).tobytes()


def read_storage(array):
    if isinstance(array, np.ndarray):
        return array
    import torch

    return array.view(torch.int16).numpy().view(np.uint16).copy()
