from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpitrain.bench.fit import Observation, error_of, fit_cluster, observations_of
from mpitrain.bench.model import Cluster, priced_algorithms, time_s
from mpitrain.collectives.table import Shape
from mpitrain.schedules import ALGORITHMS, Network, find_algorithm, price
from tests.support.bench_results import make_run, make_setup

MIB = 1 << 20
CLUSTER = Cluster(
    call_s=1.0,
    shared_call_s=3.0,
    latency_s=2.0,
    cross_latency_s=10.0,
    bytes_per_s=8.0,
    reduction_bytes_per_s=16.0,
    cross_bytes_per_s=4.0,
    memory_bytes_per_s=2.0,
)


def shape_of(nodes: int, per_node: int) -> Shape:
    return Shape(nodes, per_node, per_node, nodes * per_node)


def test_ring_on_a_node_has_the_time_computed_by_hand():
    # 6 rounds of 20 bytes, of which 3 reduce.
    assert time_s("allreduce", "ring", 80, shape_of(1, 4), CLUSTER) == pytest.approx(
        1 + 6 * 2 + 6 * 20 / 8 + 3 * 20 / 16
    )


def test_ring_across_nodes_has_the_time_computed_by_hand():
    assert time_s("allreduce", "ring", 80, shape_of(2, 2), CLUSTER) == pytest.approx(1 + 60 + 6 * 20 / 4 + 3 * 20 / 16)


def test_shared_memory_has_the_times_computed_by_hand():
    assert time_s("allreduce", "direct", 80, shape_of(1, 4), CLUSTER) == pytest.approx(3 + 40)
    # Each of 3 nodes sends 4/3 of the bytes in 4 rounds; the memory is the slower of the two.
    assert time_s("allreduce", "hierarchical", 60, shape_of(3, 2), CLUSTER) == pytest.approx(3 + 40 + 30)
    slow_link = dataclasses.replace(CLUSTER, cross_bytes_per_s=1.0)
    assert time_s("allreduce", "hierarchical", 60, shape_of(3, 2), slow_link) == pytest.approx(3 + 40 + 80)


@pytest.mark.parametrize("collective", list(ALGORITHMS))
def test_times_are_prices_and_a_call(collective):
    network = Network(
        latency_s=2.0,
        bandwidth_bytes_per_s=8.0,
        reduction_bytes_per_s=16.0,
        ranks_per_node=3,
        internode_latency_s=10.0,
        internode_bandwidth_bytes_per_s=4.0,
    )
    names = priced_algorithms(collective, shape_of(4, 3))
    assert [name for name in names if name != "hierarchical"] == list(ALGORITHMS[collective])
    for name in ALGORITHMS[collective]:
        expected = price(find_algorithm(collective, name), 1000, 12, network).total_s
        assert time_s(collective, name, 1000, shape_of(4, 3), CLUSTER) == pytest.approx(1 + expected)


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_impossible_clusters_are_refused(value):
    with pytest.raises(ValueError, match="latency_s: must be zero or more"):
        Cluster(latency_s=value)
    with pytest.raises(ValueError, match="cross_bytes_per_s: must be positive"):
        Cluster(cross_bytes_per_s=value)
    with pytest.raises(ValueError, match=r"bytes_per_s: must be positive, got 0\.0"):
        Cluster(bytes_per_s=0.0)


def observed(cluster: Cluster, nodes: tuple[int, ...], sizes: tuple[int, ...]) -> list[Observation]:
    """Return what the model itself says, as if it had been measured."""
    found = []
    for each in nodes:
        shape = shape_of(each, 2)
        for name in ("ring", "double_tree", "hierarchical", "recursive_doubling"):
            for nbytes in sizes:
                blank = Observation("allreduce", name, nbytes, shape, 1 << 19, 1.0)
                found.append(blank._replace(measured_s=blank.predicted_s(cluster)))
    return found


@settings(max_examples=10)
@given(
    cross_latency_s=st.floats(1e-6, 1e-3),
    cross_bytes_per_s=st.floats(1e7, 1e10),
    memory_bytes_per_s=st.floats(1e9, 1e10),
)
def test_fit_finds_the_cluster_that_made_the_times(cross_latency_s, cross_bytes_per_s, memory_bytes_per_s):
    truth = Cluster(
        cross_latency_s=cross_latency_s, cross_bytes_per_s=cross_bytes_per_s, memory_bytes_per_s=memory_bytes_per_s
    )
    fitted = fit_cluster(observed(truth, (2, 4), (1 << 10, 1 << 16, 16 * MIB)))
    for each in observed(truth, (3, 9), (1 << 12, MIB, 256 * MIB)):
        assert abs(error_of(each, fitted)) < 0.1, (each, fitted)


def test_fit_keeps_what_measurements_say_nothing_about():
    shape = shape_of(1, 2)
    measured = [Observation("allreduce", "ring", nbytes, shape, 1 << 19, 1e-6 * nbytes) for nbytes in (1000, 100_000)]
    start = Cluster(cross_latency_s=0.123, memory_bytes_per_s=3.21e9)
    fitted = fit_cluster(measured, start)
    assert fitted.cross_latency_s == pytest.approx(0.123)
    assert fitted.memory_bytes_per_s == pytest.approx(3.21e9)
    assert all(abs(error_of(each, fitted)) < 0.1 for each in measured)


def test_error_is_a_part_of_the_measurement():
    (each,) = observed(Cluster(), (2,), (MIB,))[:1]
    assert error_of(each._replace(measured_s=each.measured_s / 2), Cluster()) == pytest.approx(1.0)
    assert error_of(each._replace(measured_s=each.measured_s * 2), Cluster()) == pytest.approx(-0.5)


def test_only_times_that_have_a_price_are_observations():
    run = make_run(
        {"ring": {8: 1e-5}, "auto": {8: 1e-5}, "native": {8: 1e-5}, "MPI": {8: 1e-6}}, setup=make_setup(2, 2)
    )
    assert [(each.algorithm, each.measured_s, each.shape.size) for each in observations_of(run)] == [("ring", 1e-5, 4)]
    for changes in ({"dtype": "float16"}, {"op": "max"}, {"memory": "window"}):
        changed = dataclasses.replace(run, rows=tuple(dataclasses.replace(row, **changes) for row in run.rows))
        assert observations_of(changed) == []
    with pytest.raises(ValueError, match="fit: no times of algorithms that have a price"):
        fit_cluster([])
