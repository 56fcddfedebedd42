"""Where the ranks of a node meet before a blocking operation: each says what it means, and may bring its data along.

One exchange of flags in shared memory is the check that all ranks mean the same, and for small arrays the
operation itself: whoever sees that all have come also sees what they brought.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpitrain.memory import SharedBlock

__all__ = ["Meeting", "meeting_nbytes"]

_NUM_SLOTS = 2
# Every flag has a cache line of its own: number and digest of one meeting, then the number of one that has ended.
_LINE_NBYTES = 64
_LINE = _LINE_NBYTES // 8
_DIGEST = 1
_ENDED = _NUM_SLOTS * _LINE
_FLAGS_NBYTES = 4096


def meeting_nbytes(slot_nbytes: int) -> int:
    """Return how much of each rank's block a meeting takes."""
    return _FLAGS_NBYTES + _NUM_SLOTS * slot_nbytes


class Meeting:
    """The meetings of a node's ranks, one after the other.

    They take turns with two slots. A rank comes to the next meeting only when it has done with this one, so once all
    have come to the next one, nobody reads this one's slot any more, and it can be used again.

    Args:
        block: Shared by the ranks of the node; zero at first.
        rank: This rank on the node.
        offset_nbytes: Where its part of the block begins.
        slot_nbytes: Size of the largest array that can be brought along; a multiple of 16.
    """

    def __init__(self, block: SharedBlock, rank: int, offset_nbytes: int, slot_nbytes: int) -> None:
        self.rank = rank
        self.slot_nbytes = slot_nbytes
        self.slot = 0
        self._block = block
        self._fence = block.fence
        self._data_offset = offset_nbytes + _FLAGS_NBYTES
        flags = [view[offset_nbytes : offset_nbytes + _FLAGS_NBYTES].data.cast("q") for view in block.views]
        self._own = flags[rank]
        self._others = [each for index, each in enumerate(flags) if index != rank]
        self._number = 0

    def parts(self, storage: np.dtype[Any], count: int) -> list[list[NDArray[Any]]]:
        """Return, for each slot, the memory of all ranks, by rank, as `count` elements."""
        offsets = [self._data_offset + slot * self.slot_nbytes for slot in range(_NUM_SLOTS)]
        return [self._block.typed(storage, offset, count) for offset in offsets]

    @property
    def next_slot(self) -> int:
        """Slot of the next meeting, which this rank may already write to."""
        return (self._number + 1) % _NUM_SLOTS

    def arrive(self, digest: int) -> None:
        """Come to the next meeting; `slot` is its slot from now on."""
        self._number = number = self._number + 1
        self.slot = slot = number % _NUM_SLOTS
        self._own[slot * _LINE + _DIGEST] = digest
        self._fence()
        self._own[slot * _LINE] = number

    def come(self, digest: int, slots: list[NDArray[Any]], data: NDArray[Any], polls: int) -> bool:
        """Bring all of `data`, and look whether all come soon and agree: the other methods, at the price of one call.

        Args:
            digest: See `arrive`.
            slots: Where `data` goes, for each slot.
            data: What this rank brings.
            polls: How often to look.

        Returns:
            Whether it is known that they do. Else `is_complete` and `agrees` tell.
        """
        self._number = number = self._number + 1
        self.slot = slot = number % _NUM_SLOTS
        slots[slot][...] = data
        index = slot * _LINE
        own = self._own
        own[index + _DIGEST] = digest
        self._fence()
        own[index] = number
        for flags in self._others:
            while flags[index] < number:
                polls -= 1
                if polls < 0:
                    return False
        self._fence()
        return all(flags[index + _DIGEST] == digest for flags in self._others)

    def is_complete(self) -> bool:
        """Whether all have come; what they wrote before is then seen here."""
        index, number = self.slot * _LINE, self._number
        for flags in self._others:
            if flags[index] < number:
                return False
        self._fence()
        return True

    def agrees(self) -> bool:
        """Whether all brought the digest that this rank brought; for a meeting that is complete."""
        index = self.slot * _LINE + _DIGEST
        digest = self._own[index]
        return all(flags[index] == digest for flags in self._others)

    def end(self) -> None:
        """Say that this rank has written its part of the results."""
        self._fence()
        self._own[self.slot * _LINE + _ENDED] = self._number

    def has_ended(self) -> bool:
        """Whether all have said so."""
        index, number = self.slot * _LINE + _ENDED, self._number
        for flags in self._others:
            if flags[index] < number:
                return False
        self._fence()
        return True
