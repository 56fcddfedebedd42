from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from mpitrain.schedules import (
    ALGORITHMS,
    Algorithm,
    Network,
    Receive,
    Round,
    Send,
    best_num_segments,
    find_algorithm,
    price,
)

ALL = [algorithm for row in ALGORITHMS.values() for algorithm in row.values()]
RING = find_algorithm("allreduce", "ring")
DOUBLING = find_algorithm("allreduce", "recursive_doubling")
DOUBLE_TREE = find_algorithm("allreduce", "double_tree")
CHAIN = find_algorithm("broadcast", "chain")

FLAT = Network(latency_s=10.0, bandwidth_bytes_per_s=4.0, reduction_bytes_per_s=8.0)
ETHERNET = Network(latency_s=2e-5, bandwidth_bytes_per_s=1e9, reduction_bytes_per_s=1e10)
CLUSTER = Network(
    latency_s=1e-6,
    bandwidth_bytes_per_s=1e10,
    reduction_bytes_per_s=2e10,
    ranks_per_node=4,
    internode_latency_s=5e-6,
    internode_bandwidth_bytes_per_s=3e9,
)


def test_ring_has_price_computed_by_hand() -> None:
    # 6 rounds with 80 / 4 bytes each way; 3 of them reduce as many.
    priced = price(RING, 80, 4, FLAT)
    assert priced.num_rounds == 6
    assert priced.latency_s == pytest.approx(6 * 10)
    assert priced.transfer_s == pytest.approx(6 * 20 / 4)
    assert priced.reduction_s == pytest.approx(3 * 20 / 8)
    assert priced.total_s == pytest.approx(60 + 30 + 7.5)


def test_recursive_doubling_has_price_computed_by_hand() -> None:
    # Of 6 ranks two fold in: 4 rounds of 80 bytes, the last of which only copies.
    priced = price(DOUBLING, 80, 6, FLAT)
    assert (priced.latency_s, priced.transfer_s, priced.reduction_s) == pytest.approx((40, 4 * 20, 3 * 10))


def test_messages_of_a_round_share_the_port() -> None:
    # In the only full round a rank sends one half up one tree and one half down the other.
    priced = price(DOUBLE_TREE, 80, 2, FLAT, num_segments=1)
    assert priced.transfer_s == pytest.approx(2 * 40 / 4)
    assert price(DOUBLE_TREE, 80, 2, FLAT, num_segments=4).transfer_s == pytest.approx((1 + 2 + 2 + 2 + 1) * 10 / 4)


def test_alltoall_counts_the_send_buffer() -> None:
    priced = price(find_algorithm("alltoall", "pairwise"), 80, 4, FLAT)
    assert priced.transfer_s == pytest.approx(3 * 20 / 4)


def test_barrier_costs_latencies_only() -> None:
    priced = price(find_algorithm("barrier", "dissemination"), 0, 9, FLAT)
    assert (priced.total_s, priced.num_rounds) == (40, 4)


def test_ranks_of_a_node_share_its_link() -> None:
    # 2 nodes x 2 ranks. In round 0 of the doubling peers share a node; in round 1 both ranks of
    # a node send 80 bytes through one link.
    network = Network(
        latency_s=1,
        bandwidth_bytes_per_s=40,
        ranks_per_node=2,
        internode_latency_s=100,
        internode_bandwidth_bytes_per_s=10,
    )
    priced = price(DOUBLING, 80, 4, network)
    assert priced.latency_s == 101
    assert priced.transfer_s == pytest.approx(80 / 40 + 160 / 10)
    # The ring crosses with one rank per node and direction.
    assert price(RING, 80, 4, network).transfer_s == pytest.approx(6 * 20 / 10)


def test_incoming_messages_share_the_link_of_the_receiver() -> None:
    # A star: the root of a gather receives from all others at once, each on its own node.
    def star(rank: int, size: int, root: int) -> Iterator[Round]:
        if rank == root:
            yield Round(receives=tuple(Receive(peer, peer, peer + 1) for peer in range(size) if peer != root))
        else:
            yield Round(sends=(Send(root, rank, rank + 1),))

    network = Network(latency_s=1, bandwidth_bytes_per_s=40, ranks_per_node=1, internode_bandwidth_bytes_per_s=10)
    priced = price(replace(find_algorithm("gather", "binomial"), schedule=star), 80, 4, network)
    assert priced.transfer_s == pytest.approx(3 * 20 / 10)


def test_one_node_has_no_links_to_share() -> None:
    one_node = replace(CLUSTER, ranks_per_node=16)
    no_nodes = replace(CLUSTER, ranks_per_node=None)
    for algorithm in ALL:
        assert price(algorithm, 1e6, 16, one_node) == price(algorithm, 1e6, 16, no_nodes)


def test_ring_wins_at_large_and_doubling_at_small_sizes() -> None:
    for size in (4, 8, 13, 32):
        assert price(RING, 1e9, size, ETHERNET).total_s < price(DOUBLING, 1e9, size, ETHERNET).total_s
        assert price(RING, 8, size, ETHERNET).total_s > price(DOUBLING, 8, size, ETHERNET).total_s


@pytest.mark.parametrize("algorithm", ALL, ids=lambda each: each.qualified_name)
@pytest.mark.parametrize(
    ("size", "ranks_per_node"), [(12, 1), (12, 4), (12, 5), (13, 4), (13, 9), (13, 12), (12, None)]
)
def test_symmetry_changes_no_price(algorithm: Algorithm, size: int, ranks_per_node: int | None) -> None:
    network = replace(CLUSTER, ranks_per_node=ranks_per_node)
    full_walk = replace(algorithm, is_symmetric=False)
    priced = price(algorithm, 1e6, size, network, num_segments=3)
    assert priced == price(full_walk, 1e6, size, network, num_segments=3)
    assert priced.latency_s > 0
    assert (priced.transfer_s > 0) == (algorithm.collective != "barrier")


@pytest.mark.parametrize("algorithm", ALL, ids=lambda each: each.qualified_name)
def test_no_price_is_below_the_bandwidth_bound(algorithm: Algorithm) -> None:
    for size in (2, 5, 8):
        sent_s = float(algorithm.volume(size, 4)) * 1e6 / ETHERNET.bandwidth_bytes_per_s
        assert price(algorithm, 1e6, size, ETHERNET, num_segments=4).transfer_s >= sent_s * (1 - 1e-12)


def test_thousands_of_ranks_can_be_priced() -> None:
    slow = price(RING, 1e8, 4096, CLUSTER)
    fast = price(find_algorithm("allreduce", "halving_doubling"), 1e8, 2048, CLUSTER)
    assert slow.num_rounds == 2 * 4095
    # On the link every rank of a node would send its share; the ring sends through it once.
    assert slow.transfer_s == pytest.approx(2 * 4095 / 4096 * 1e8 / 3e9)
    assert fast.num_rounds == 22


@pytest.mark.parametrize("algorithm", [DOUBLE_TREE, CHAIN], ids=lambda each: each.qualified_name)
@pytest.mark.parametrize("size", [2, 3, 5, 8, 13])
@pytest.mark.parametrize("nbytes", [1e2, 1e5, 1e6, 1e7])
@pytest.mark.parametrize("network", [ETHERNET, CLUSTER], ids=["ethernet", "cluster"])
def test_best_num_segments_is_that_of_an_exhaustive_search(
    algorithm: Algorithm, size: int, nbytes: float, network: Network
) -> None:
    totals = [price(algorithm, nbytes, size, network, num_segments=count).total_s for count in range(1, 41)]
    best = best_num_segments(algorithm, nbytes, size, network, max_segments=40)
    assert totals[best - 1] == pytest.approx(min(totals), rel=1e-9)


def test_best_num_segments_follows_the_size() -> None:
    assert best_num_segments(CHAIN, 10, 8, ETHERNET) == 1
    # The continuous optimum is sqrt((p - 2) n / (bandwidth x latency)) = sqrt(6 * 1e8 / 2e4).
    assert best_num_segments(CHAIN, 1e8, 8, ETHERNET) == pytest.approx(173, abs=1)
    assert best_num_segments(CHAIN, 1e8, 8, ETHERNET, max_segments=50) == 50
    assert best_num_segments(RING, 1e8, 8, ETHERNET) == 1
    assert best_num_segments(DOUBLE_TREE, 1e8, 8, replace(ETHERNET, latency_s=0), max_segments=99) == 99


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="nbytes: negative, got -1"):
        price(RING, -1, 4, FLAT)
    with pytest.raises(ValueError, match="size: out of range, got 0"):
        price(RING, 1, 0, FLAT)
    with pytest.raises(ValueError, match="bandwidth_bytes_per_s: out of range, got 0"):
        Network(latency_s=0, bandwidth_bytes_per_s=0)
    with pytest.raises(ValueError, match="ranks_per_node: out of range, got 0"):
        Network(latency_s=0, bandwidth_bytes_per_s=1, ranks_per_node=0)
