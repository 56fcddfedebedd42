"""Rounds on a binomial tree whose root is vrank 0.

Terms: the vrank of a node other than the root has a lowest set bit 2**k; its parent is the vrank
without that bit, and its *subtree* the 2**k vranks from its own on (fewer at the end).
So a subtree is contiguous, and the nodes with the same k exchange with their parents in the same round.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeAlias

from mpitrain.schedules.rounds import Receive, Round, Send

__all__ = [
    "Block",
    "binomial_down_rounds",
    "binomial_up_rounds",
    "ceil_log2",
    "one_chunk",
    "subtree_chunks",
]

Block: TypeAlias = Callable[[int, int, int], tuple[int, int]]
"""The chunks on the edge above a node, given its vrank, its lowest set bit and the size."""


def ceil_log2(number: int) -> int:
    """Return the smallest m with 2**m >= `number`, which must be positive."""
    return (number - 1).bit_length()


def one_chunk(_vrank: int, _bit: int, _size: int) -> tuple[int, int]:
    """Return the only chunk, whatever the edge."""
    return 0, 1


def subtree_chunks(vrank: int, bit: int, size: int) -> tuple[int, int]:
    """Return the chunks of the subtree of `vrank` when chunk v belongs to vrank v."""
    return vrank, min(vrank + bit, size)


def binomial_down_rounds(vrank: int, size: int, block: Block) -> Iterator[Round]:
    """Yield rounds that bring blocks from the root down; the largest subtrees come first."""
    for k in reversed(range(ceil_log2(size))):
        bit = 1 << k
        if vrank % (2 * bit) == bit:
            yield Round(receives=(Receive(vrank - bit, *block(vrank, bit, size)),))
        elif vrank % (2 * bit) == 0 and vrank + bit < size:
            child = vrank + bit
            yield Round(sends=(Send(child, *block(child, bit, size)),))
        else:
            yield Round()


def binomial_up_rounds(vrank: int, size: int, block: Block, *, reduce: bool) -> Iterator[Round]:
    """Yield rounds that bring blocks up to the root; the smallest subtrees come first."""
    for k in range(ceil_log2(size)):
        bit = 1 << k
        if vrank % (2 * bit) == bit:
            yield Round(sends=(Send(vrank - bit, *block(vrank, bit, size)),))
        elif vrank % (2 * bit) == 0 and vrank + bit < size:
            child = vrank + bit
            yield Round(receives=(Receive(child, *block(child, bit, size), reduce),))
        else:
            yield Round()
