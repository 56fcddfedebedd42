from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpitrain.schedules import ALGORITHMS, Network, loads, price
from mpitrain.schedules.loads import loads_of, quick_loads
from mpitrain.schedules.price import price_of_loads

ALL = [algorithm for row in ALGORITHMS.values() for algorithm in row.values()]
NETWORK = {
    "latency_s": 1e-6,
    "bandwidth_bytes_per_s": 1e10,
    "reduction_bytes_per_s": 2e10,
    "internode_latency_s": 5e-6,
    "internode_bandwidth_bytes_per_s": 3e9,
}


def quickly_priced_s(algorithm, nbytes, size, per_node, num_segments):
    quick = quick_loads(algorithm, size, per_node, num_segments=num_segments)
    chunk_nbytes = nbytes / (algorithm.chunks_per_buffer(size, num_segments) or 1)
    return price_of_loads(quick, chunk_nbytes, Network(**NETWORK, ranks_per_node=per_node)).total_s


@pytest.mark.parametrize("name", list(loads._FORMULAS))
@given(size=st.integers(2, 70), per_node=st.integers(1, 9), num_segments=st.integers(1, 7))
def test_formulas_count_what_walking_counts(name, size, per_node, num_segments):
    (algorithm,) = [each for each in ALL if each.qualified_name == name]
    per_node = min(per_node, size)
    counted = loads._FORMULAS[name](size, per_node, num_segments)
    assert counted == loads_of(algorithm, size, per_node, num_segments=num_segments)


@pytest.mark.parametrize("algorithm", ALL, ids=lambda each: each.qualified_name)
def test_few_ranks_stand_for_all(algorithm, monkeypatch):
    if algorithm.qualified_name in loads._FORMULAS:
        pytest.skip("has a formula")
    monkeypatch.setattr(loads, "_MOST_WALKED", 0)
    for size, per_node, num_segments in ((64, 8, 4), (96, 8, 1), (100, 4, 9), (257, 16, 3), (300, 1, 2), (130, 130, 2)):
        for nbytes in (0, 1 << 26):
            exact = price(
                algorithm, nbytes, size, Network(**NETWORK, ranks_per_node=per_node), num_segments=num_segments
            ).total_s
            quick = quickly_priced_s(algorithm, nbytes, size, per_node, num_segments)
            assert exact * 0.9 <= quick <= exact * (1 + 1e-9), (size, per_node, num_segments, nbytes)


@pytest.mark.parametrize("algorithm", ALL, ids=lambda each: each.qualified_name)
def test_many_ranks_are_counted_without_walking_them(algorithm, monkeypatch):
    walked = []
    true_rounds_of = type(algorithm).rounds_of

    def rounds_of(self, rank, size, **options):
        walked.append(rank)
        return true_rounds_of(self, rank, size, **options)

    monkeypatch.setattr(type(algorithm), "rounds_of", rounds_of)
    size = 100_000
    counted = quick_loads(algorithm, size, 8, num_segments=16)
    assert len(walked) <= 2000
    assert counted.total() == algorithm.rounds(size, 16)
