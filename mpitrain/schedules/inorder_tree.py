"""A binary tree over consecutive labels in which all odd labels are leaves.

Terms: labels are 1 to `size`; the *height* of a label is its lowest set bit. Were `size` one less than a
power of two, the tree would be the complete one in in-order numbering: the parent of a
label clears its height bit and sets the next higher one. A parent that does not exist is
passed over, its own parent taking its place.
"""

from __future__ import annotations

from typing import NamedTuple

from mpitrain.schedules.fold import is_power_of_two

__all__ = ["Node", "inorder_node"]


class Node(NamedTuple):
    """The neighbours of a label, and its distance from the root."""

    parent: int | None
    children: tuple[int, ...]
    depth: int


def inorder_node(label: int, size: int) -> Node:
    """Return the node of `label` in the tree over `size` labels."""
    parent = _parent(label, size)
    depth = 0
    above = parent
    while above is not None:
        depth += 1
        above = _parent(above, size)
    return Node(parent, _children(label, size), depth)


def _parent(label: int, size: int) -> int | None:
    # The root is the largest power of two, so only it has no parent that exists.
    if 2 * label > size and is_power_of_two(label):
        return None
    parent = label
    while True:
        height = parent & -parent
        parent = (parent ^ height) | (2 * height)
        if parent <= size:
            return parent


def _children(label: int, size: int) -> tuple[int, ...]:
    half = (label & -label) // 2
    if half == 0:
        return ()
    # Of a right subtree that is cut off by `size`, the first existing node on its left
    # spine moves up.
    right_half = half
    while right_half and label + right_half > size:
        right_half //= 2
    left = (label - half,)
    return (*left, label + right_half) if right_half else left
