"""Exchanges over doubling distances in the core of a fold, where each core owns a block.

Terms: a *block* of 2**k cores starts at a multiple of 2**k. A core exchanges with the
core whose number differs in bit k; the block of that one is the *sibling* of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import repeat
from typing import NamedTuple

from mpitrain.schedules.fold import Fold
from mpitrain.schedules.rounds import Receive, Round, Send

__all__ = ["Exchange", "doubling_rounds", "exchanges", "halving_rounds"]


class Exchange(NamedTuple):
    """One exchange of a core rank: `peer` is a rank, the blocks count in cores."""

    peer: int
    own_start: int
    sibling_start: int
    length: int


def exchanges(fold: Fold) -> Iterator[Exchange]:
    """Yield the exchanges of a core rank, the nearest peer first."""
    for k in range(fold.num_doublings):
        length = 1 << k
        own_start = fold.core & -length
        yield Exchange(fold.rank_of(fold.core ^ length), own_start, own_start ^ length, length)


def halving_rounds(fold: Fold, first_chunk: Callable[[int], int]) -> Iterator[Round]:
    """Yield rounds after which every core rank holds its own chunks reduced over the core.

    Args:
        fold: The place of the rank.
        first_chunk: The first chunk of a core; it must also take `core_size`.
    """
    if fold.is_extra:
        yield from repeat(Round(), fold.num_doublings)
        return
    # The farthest peer first: blocks must shrink for their chunks to stay contiguous.
    for peer, own_start, sibling_start, length in reversed(list(exchanges(fold))):
        sent = first_chunk(sibling_start), first_chunk(sibling_start + length)
        kept = first_chunk(own_start), first_chunk(own_start + length)
        yield Round(sends=(Send(peer, *sent),), receives=(Receive(peer, *kept, reduce=True),))


def doubling_rounds(fold: Fold, first_chunk: Callable[[int], int]) -> Iterator[Round]:
    """Yield rounds that bring the chunks of every core to the whole core.

    The arguments are those of `halving_rounds`, which these rounds undo.
    """
    if fold.is_extra:
        yield from repeat(Round(), fold.num_doublings)
        return
    for peer, own_start, sibling_start, length in exchanges(fold):
        sent = first_chunk(own_start), first_chunk(own_start + length)
        received = first_chunk(sibling_start), first_chunk(sibling_start + length)
        yield Round(sends=(Send(peer, *sent),), receives=(Receive(peer, *received),))
