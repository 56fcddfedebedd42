"""The trees and the fold that several algorithms stand on."""

from __future__ import annotations

import pytest

from mpitrain.schedules import find_algorithm
from mpitrain.schedules.fold import Fold
from mpitrain.schedules.inorder_tree import inorder_node
from mpitrain.schedules.rotation import wrapped_ranges


@pytest.mark.parametrize("size", range(1, 70))
def test_inorder_tree_is_a_binary_tree_of_least_depth(size: int) -> None:
    nodes = {label: inorder_node(label, size) for label in range(1, size + 1)}
    roots = [label for label, node in nodes.items() if node.parent is None]
    assert len(roots) == 1
    for label, node in nodes.items():
        assert len(node.children) <= 2
        for child in node.children:
            assert nodes[child].parent == label
            assert nodes[child].depth == node.depth + 1
        if label % 2 == 1:
            assert node.children == ()
    # Each label but the root hangs below its parent, once.
    assert sorted(child for node in nodes.values() for child in node.children) == sorted(
        label for label in nodes if label != roots[0]
    )
    assert max(node.depth for node in nodes.values()) == size.bit_length() - 1


@pytest.mark.parametrize("size", range(2, 65))
def test_double_tree_uses_each_rank_as_interior_of_one_tree_at_most(size: int) -> None:
    for rank in range(size):
        # With one segment per tree chunk 0 belongs to the first tree and chunk 1 to the second; an
        # interior rank is one that reduces.
        rounds = find_algorithm("allreduce", "double_tree").rounds_of(rank, size)
        reduced = {receive.start for current in rounds for receive in current.receives if receive.reduce}
        assert len(reduced) <= 1


def test_double_tree_sends_while_it_receives() -> None:
    rounds = list(find_algorithm("allreduce", "double_tree").rounds_of(3, 8, num_segments=9))
    assert len(rounds) == 9 + 2 * 3 - 1
    up_and_down = [
        current
        for current in rounds
        if any(receive.reduce for receive in current.receives)
        and any(not receive.reduce for receive in current.receives)
    ]
    assert len(up_and_down) >= 5


@pytest.mark.parametrize("size", range(1, 70))
def test_fold_groups_cover_all_ranks_in_order(size: int) -> None:
    folds = [Fold.of(rank, size) for rank in range(size)]
    core = [fold for fold in folds if not fold.is_extra]
    assert [fold.core for fold in core] == list(range(folds[0].core_size))
    assert [fold.rank_of(fold.core) for fold in core] == [fold.rank for fold in core]
    assert core[0].rank_of(folds[0].core_size) == size
    for fold in folds:
        assert fold.rank_of(fold.core) <= fold.rank < fold.rank_of(fold.core + 1)


@pytest.mark.parametrize("size", range(1, 9))
def test_wrapped_ranges_list_the_chunks_in_order(size: int) -> None:
    for first in range(2 * size):
        for count in range(size + 1):
            ranges = wrapped_ranges(first, count, size)
            chunks = [chunk for start, stop in ranges for chunk in range(start, stop)]
            assert chunks == [(first + index) % size for index in range(count)]
            assert len(ranges) <= 2
