"""Every algorithm of the registry on real buffers: sizes, counts, dtypes, ops, roots, segments in flight."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from mpitrain.config import Settings
from mpitrain.schedules import ALGORITHMS
from tests.support.cases import ALL_ALGORITHMS, CHECKS, REDUCING, Case, grid, run_cases, thorough_grid
from tests.support.ranks import run_communicators

pytest.importorskip("torch")

SIZES = (1, 2, 3, 4, 5, 6, 7, 8)
LARGE_SIZES = (13, 16)

# A message of 1000 elements becomes up to 250 segments.
TINY = Settings(wait="sleep", check=False, segment_nbytes=32, receive_window=4)
NARROW = Settings(wait="sleep", check=False, segment_nbytes=80, receive_window=1)
WHOLE = Settings(wait="sleep", check=False)


def test_every_collective_of_the_registry_is_checked():
    assert set(CHECKS) == set(ALGORITHMS)


@pytest.mark.parametrize(("collective", "algorithm"), ALL_ALGORITHMS)
@pytest.mark.parametrize("size", SIZES)
def test_results_are_exact_whole_messages(size, collective, algorithm):
    numbers = run_communicators(
        size,
        lambda comm: run_cases(comm, collective, algorithm, thorough_grid(collective, size)),
        settings=WHOLE,
        rendezvous=size % 2 == 0,
    )
    assert min(numbers) > 10


@pytest.mark.parametrize(("collective", "algorithm"), ALL_ALGORITHMS)
@pytest.mark.parametrize("size", SIZES)
def test_results_are_exact_many_segments_in_flight(size, collective, algorithm):
    for settings, rendezvous in ((TINY, False), (NARROW, True)):
        cases = itertools.chain(grid(collective, size), [Case(count=90, root=size - 1)])
        run_communicators(
            size,
            lambda comm, cases=tuple(cases): run_cases(comm, collective, algorithm, iter(cases)),
            settings=settings,
            rendezvous=rendezvous,
        )


@pytest.mark.parametrize(("collective", "algorithm"), ALL_ALGORITHMS)
@pytest.mark.parametrize("size", LARGE_SIZES)
def test_results_are_exact_many_ranks(size, collective, algorithm):
    dtypes = ("float32", "bfloat16", "int64", "complex64") if size == 13 else ("float16", "bool")
    run_communicators(
        size,
        lambda comm: run_cases(comm, collective, algorithm, grid(collective, size, dtypes)),
        settings=NARROW if size == 13 else TINY,
        rendezvous=size == 13,
    )


@pytest.mark.parametrize(
    ("collective", "algorithm"),
    [pair for pair in ALL_ALGORITHMS if pair[0] in REDUCING and pair[0] != "reduce"],
)
@pytest.mark.parametrize("size", [3, 6, 7, 8])
@pytest.mark.parametrize("op", ["sum", "average", "product"])
def test_ranks_agree_bit_for_bit_where_rounding_depends_on_the_order(op, size, collective, algorithm):
    count = 101

    def body(comm):
        array = np.sin(np.arange(count) * (comm.rank + 1) + 0.3).astype(np.float32)
        part = getattr(comm, collective)(array, op=op, algorithm=algorithm)
        # Every rank gets the parts of all, so that reduce_scatter is compared as a whole.
        repeated = getattr(comm, collective)(array, op=op, algorithm=algorithm)
        assert part.tobytes() == repeated.tobytes()
        return part

    results = run_communicators(size, body, settings=TINY)
    parts = np.stack([np.sin(np.arange(count) * (rank + 1) + 0.3).astype(np.float32) for rank in range(size)])
    wide = parts.astype(np.float64)
    expected = {"sum": wide.sum(0), "average": wide.mean(0), "product": wide.prod(0)}[op]
    if collective == "reduce_scatter":
        results = [np.concatenate(results)]
    assert len({result.tobytes() for result in results}) == 1
    np.testing.assert_allclose(results[0], expected, rtol=1e-4, atol=1e-6)
