from __future__ import annotations

import pytest

from mpitrain.comm import Topology, run_ranks
from mpitrain.comm import topology as topology_module


def discover(size, ranks_per_node):
    return run_ranks(size, Topology.discover, ranks_per_node=ranks_per_node)


@pytest.mark.parametrize(("size", "ranks_per_node"), [(1, None), (4, None), (6, 2), (6, 3), (4, 1)])
def test_equal_nodes(size, ranks_per_node):
    per_node = ranks_per_node or size
    for rank, topology in enumerate(discover(size, ranks_per_node)):
        assert topology.rank == rank
        assert topology.is_homogeneous
        assert topology.node_index == rank // per_node
        assert topology.local_ranks == tuple(range(rank // per_node * per_node, (rank // per_node + 1) * per_node))
        assert (topology.local_rank, topology.local_size) == (rank % per_node, per_node)
        assert topology.cross_ranks == tuple(range(rank % per_node, size, per_node))
        assert (topology.cross_rank, topology.cross_size) == (rank // per_node, size // per_node)


def test_uneven_nodes():
    # Nodes of 3, 3 and 1 ranks.
    topologies = discover(7, 3)
    assert topologies[0].nodes == ((0, 1, 2), (3, 4, 5), (6,))
    assert not topologies[0].is_homogeneous
    assert topologies[6].local_size == 1
    assert topologies[6].cross_ranks == (0, 3, 6)
    assert (topologies[4].cross_ranks, topologies[4].cross_rank) == ((1, 4), 1)
    assert topologies[5].cross_size == 2


def test_ranks_of_a_node_need_not_be_neighbours():
    # The world's ranks 0..5 on nodes of two, in the order 5, 3, 1, 4, 2, 0.
    def body(transport):
        return Topology.discover(transport.split(0, -transport.rank + 10 * (transport.rank % 2 == 0)))

    topologies = run_ranks(6, body, ranks_per_node=2)
    by_rank = sorted(topologies, key=lambda topology: topology.rank)
    assert by_rank[0].nodes == ((0, 3), (1, 4), (2, 5))
    assert [topology.local_rank for topology in by_rank] == [0, 0, 0, 1, 1, 1]
    assert [topology.node_index for topology in by_rank] == [0, 1, 2, 0, 1, 2]


def test_cores_are_shared_by_the_ranks_of_a_node(monkeypatch):
    monkeypatch.setattr(topology_module, "_usable_cores", lambda: set(range(8)))
    assert [topology.cores_per_rank for topology in discover(6, 4)] == [2.0] * 4 + [4.0] * 2


def test_cores_that_ranks_are_bound_to_add_up(monkeypatch):
    import threading

    # Each rank is bound to a core of its own.
    monkeypatch.setattr(topology_module, "_usable_cores", lambda: {int(threading.current_thread().name.split()[1])})
    assert [topology.cores_per_rank for topology in discover(4, None)] == [1.0] * 4
