from __future__ import annotations

import math

import pytest

from mpitrain.collectives import predict
from mpitrain.collectives.predict import predict_algorithm, predicted_s
from mpitrain.collectives.selection import Available, known_algorithms
from mpitrain.collectives.table import Shape
from mpitrain.schedules import ALGORITHMS, Algorithm

SEGMENT_NBYTES = 1 << 19
SIZES = [0, 8, 1 << 10, 1 << 14, 1 << 18, 1 << 22, 1 << 27]
ONE_NODE = [Shape(1, size, size, size) for size in (2, 3, 8, 64, 128)]
NODES = [Shape(4, 1, 1, 4), Shape(2, 2, 2, 4), Shape(3, 1, 4, 7), Shape(16, 8, 8, 128), Shape(128, 1, 1, 128)]
THOUSANDS = [Shape(1000, 1, 1, 1000), Shape(125, 8, 8, 1000), Shape(1024, 4, 4, 4096)]


def candidates(collective: str, shape: Shape, *, has_native: bool = True, has_shared: bool = True) -> tuple[str, ...]:
    shared = "direct" if shape.num_nodes == 1 else "hierarchical"
    available = Available(has_native, shared if has_shared and shape.largest > 1 else None)
    return tuple(known_algorithms(collective, available)[1:])


def choose(collective: str, nbytes: int, shape: Shape, *, in_window: bool = False, **has: bool) -> str:
    names = candidates(collective, shape, **has)
    return predict_algorithm(collective, nbytes, shape, names, segment_nbytes=SEGMENT_NBYTES, in_window=in_window)


@pytest.mark.parametrize("shape", [*ONE_NODE, *NODES, *THOUSANDS], ids=str)
@pytest.mark.parametrize("collective", ALGORITHMS)
def test_choice_is_the_cheapest_candidate(collective, shape):
    for has_native in (True, False):
        names = candidates(collective, shape, has_native=has_native)
        for nbytes in SIZES:
            chosen = choose(collective, nbytes, shape, has_native=has_native)
            costs = {
                name: predicted_s(collective, name, nbytes, shape, segment_nbytes=SEGMENT_NBYTES) for name in names
            }
            assert all(math.isfinite(cost) and cost > 0 for cost in costs.values())
            assert costs[chosen] == pytest.approx(min(costs.values()), rel=1e-5)


@pytest.mark.parametrize("shape", [*ONE_NODE, *NODES, *THOUSANDS], ids=str)
@pytest.mark.parametrize("collective", ALGORITHMS)
def test_small_buffers_are_for_the_mpi_library_and_for_shared_memory(collective, shape):
    fast = {"native", "direct"} if shape.num_nodes == 1 else {"native"}
    for nbytes in (0, 8, 1024):
        assert choose(collective, nbytes, shape) in fast
    if collective == "allreduce" and shape.size <= 8:
        assert choose(collective, 8, shape) == ("direct" if shape.num_nodes == 1 else "native")


@pytest.mark.parametrize("shape", THOUSANDS, ids=str)
@pytest.mark.parametrize("collective", ["allreduce", "broadcast", "allgather", "reduce_scatter", "reduce"])
def test_small_buffers_of_thousands_of_ranks_take_few_rounds(collective, shape):
    name = choose(collective, 1024, shape, has_native=False, has_shared=False)
    assert ALGORITHMS[collective][name].rounds(shape.size, 1) <= 2 * math.ceil(math.log2(shape.size)) + 2


@pytest.mark.parametrize("shape", [*ONE_NODE, *NODES], ids=str)
def test_large_all_reduces_send_no_more_than_they_must(shape):
    name = choose("allreduce", 1 << 27, shape, has_shared=False)
    assert name != "native"
    # The least possible, and as much again for ranks beyond the largest power of two.
    assert ALGORITHMS["allreduce"][name].volume(shape.size, 1) <= 4


def test_links_between_nodes_are_spared():
    # All ranks of a node share its link, and in a ring only one of them uses it.
    assert choose("allreduce", 1 << 26, Shape(2, 4, 4, 8), has_native=False, has_shared=False) == "ring"
    assert choose("allreduce", 1 << 26, Shape(2, 4, 4, 8)) == "hierarchical"


def test_shared_arrays_need_no_messages_in_a_node():
    for shape in ONE_NODE:
        assert choose("allreduce", 1 << 22, shape, in_window=True) == "direct"
        assert choose("allreduce", 64, shape, in_window=True) == "direct"


def test_native_is_given_up_earlier_in_the_background():
    shape = ONE_NODE[0]
    names = candidates("allreduce", shape, has_shared=False)
    last = {
        blocking: max(
            nbytes
            for nbytes in (1 << power for power in range(3, 28))
            if predict_algorithm("allreduce", nbytes, shape, names, segment_nbytes=SEGMENT_NBYTES, blocking=blocking)
            == "native"
        )
        for blocking in (True, False)
    }
    assert last[False] < last[True]


@pytest.mark.parametrize("shape", [*ONE_NODE, *NODES], ids=str)
@pytest.mark.parametrize("collective", ["allreduce", "broadcast", "allgather", "reduce_scatter"])
def test_prices_grow_with_the_buffer(collective, shape):
    for name in candidates(collective, shape):
        costs = [predicted_s(collective, name, nbytes, shape, segment_nbytes=1 << 40) for nbytes in SIZES]
        assert costs == sorted(costs)


@pytest.mark.parametrize("size", [2, 3, 4, 7, 8, 16])
@pytest.mark.parametrize(
    "algorithm",
    [each for row in ALGORITHMS.values() for each in row.values() if each.collective != "barrier"],
    ids=lambda each: each.qualified_name,
)
def test_formulas_are_close_to_the_walk_within_a_node(monkeypatch, algorithm, size):
    shape = Shape(1, size, size, size)
    monkeypatch.setattr(predict, "_MOST_WALKED", math.inf)
    predict._costs.cache_clear()
    walked = predict._costs(algorithm, shape, 1)
    predict._costs.cache_clear()
    by_formula = predict._costs_by_formula(algorithm, shape, 1)
    # A walk counts the busiest rank of each round, a formula the busiest of all rounds.
    assert walked[0] <= by_formula[0] * 1.001
    assert by_formula[0] <= walked[0] * 1.001
    assert 0.5 <= by_formula[1] / walked[1] <= 2


@pytest.mark.parametrize("shape", [*ONE_NODE, *NODES, *THOUSANDS], ids=str)
def test_few_rounds_are_walked_whatever_the_size(monkeypatch, shape):
    walked = 0
    rounds_of = Algorithm.rounds_of

    def count(*arguments, **options):
        nonlocal walked
        for each in rounds_of(*arguments, **options):
            walked += 1
            yield each

    monkeypatch.setattr(Algorithm, "rounds_of", count)
    predict._costs.cache_clear()
    predict_algorithm.cache_clear()
    for collective in ALGORITHMS:
        before = walked
        choose(collective, 1 << 24, shape)
        # Two numbers of segments of each algorithm. A ring of 128 ranks alone would have 32512.
        assert walked - before <= 128 * 2 * len(ALGORITHMS[collective])
    assert walked > 0


def test_what_has_no_price_is_refused():
    with pytest.raises(ValueError, match="collective: unknown, got 'allsum'"):
        predicted_s("allsum", "ring", 10, ONE_NODE[0], segment_nbytes=1)
    with pytest.raises(ValueError, match="algorithm of allreduce: has no price, got 'magic'"):
        predicted_s("allreduce", "magic", 10, ONE_NODE[0], segment_nbytes=1)
