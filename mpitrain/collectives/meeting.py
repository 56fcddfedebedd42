"""Where the ranks of a node meet before a blocking operation: each says what it means, and may bring its data along.

One exchange of flags in shared memory is the check that all ranks mean the same, and for small arrays the
operation itself: whoever sees that all have come also sees what they brought.

Asynchronous operations have no meeting, as nobody could wait for its turn; they agree by messages. But each rank passes
one by where it would have been, so a rank that waits at a meeting learns of another that has not come to it and never
will, as it has called the asynchronous form.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpitrain.collectives.executor import Task
from mpitrain.errors import CollectiveMismatchError
from mpitrain.memory import SharedBlock

__all__ = ["DIGEST", "LINE", "NEXT", "Meeting", "meeting_nbytes"]

_NUM_SLOTS = 2
# Every flag has a cache line of its own: number, digest and mark of one meeting, the number of one that has ended; then
# the number of the first meeting that this rank may still come to.
_LINE_NBYTES = 64
LINE = _LINE_NBYTES // 8
DIGEST = 1
_MARK = 2
_ENDED = _NUM_SLOTS * LINE
NEXT = 2 * _NUM_SLOTS * LINE
_FLAGS_NBYTES = 4096
# Between two looks whether a rank that is waited for will not come.
_POLLS = 16


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

    Attributes:
        rank, slot_nbytes: The same.
        number: Of the meeting to which this rank has come last. They ascend, with gaps: see `pass_by`.
        own: This rank's flags, as integers; the line of slot s begins at s * LINE with the number, the digest at DIGEST
            in it.
        others: Those of the other ranks.
        fence, needs_fence: Of the block.
    """

    def __init__(self, block: SharedBlock, rank: int, offset_nbytes: int, slot_nbytes: int) -> None:
        self.rank = rank
        self.slot_nbytes = slot_nbytes
        self._block = block
        self.fence = block.fence
        self.needs_fence = block.needs_fence
        self._data_offset = offset_nbytes + _FLAGS_NBYTES
        flags = [view[offset_nbytes : offset_nbytes + _FLAGS_NBYTES].data.cast("q") for view in block.views]
        self.own = flags[rank]
        self.others = [each for index, each in enumerate(flags) if index != rank]
        self._ranks_of_others = [index for index in range(len(flags)) if index != rank]
        self.number = 0

    def parts(self, storage: np.dtype[Any], count: int) -> list[list[NDArray[Any]]]:
        """Return, for each slot, the memory of all ranks, by rank, as `count` elements."""
        offsets = [self._data_offset + slot * self.slot_nbytes for slot in range(_NUM_SLOTS)]
        return [self._block.typed(storage, offset, count) for offset in offsets]

    @property
    def slot(self) -> int:
        """Slot of the meeting to which this rank has come last."""
        return self.number % _NUM_SLOTS

    @property
    def next_slot(self) -> int:
        """Slot of the next meeting, which this rank may already write to."""
        return (self.number + 1) % _NUM_SLOTS

    def arrive(self, digest: int, *, is_marked: bool = False) -> None:
        """Come to the next meeting; `slot` is its slot from now on. What all have marked they may do in another way."""
        self.number = number = self.number + 1
        slot = number % _NUM_SLOTS
        self.own[slot * LINE + DIGEST] = digest
        self.own[slot * LINE + _MARK] = is_marked
        self.fence()
        self.own[slot * LINE] = number

    def is_complete(self) -> bool:
        """Whether all have come; what they wrote before is then seen here."""
        index, number = self.slot * LINE, self.number
        for flags in self.others:
            if flags[index] != number:
                return False
        self.fence()
        return True

    def wait(self) -> Task[None]:
        """Return the task that waits until all have come.

        Raises:
            CollectiveMismatchError: A rank never will; others may still wait for this one.
        """
        polls = 0
        while not self.is_complete():
            polls += 1
            if polls % _POLLS == 0:
                rank = self.find_absent()
                if rank is not None:
                    raise CollectiveMismatchError(
                        f"collective: rank {rank} has called an asynchronous form where this rank waits in a blocking "
                        "one; call the same form on every rank"
                    )
            yield False

    def find_absent(self) -> int | None:
        """Return a rank that has not come and never will; None if there is none, or not yet."""
        index, number = self.slot * LINE, self.number
        for rank, flags in zip(self._ranks_of_others, self.others, strict=True):
            if flags[NEXT] > number:
                # In this order: who has come before passing another one by is seen to have come.
                self.fence()
                if flags[index] != number:
                    return rank
        return None

    def missing(self) -> list[int]:
        """Return the ranks that have not come yet."""
        index, number = self.slot * LINE, self.number
        others = zip(self._ranks_of_others, self.others, strict=True)
        return [rank for rank, flags in others if flags[index] != number]

    def pass_by(self) -> None:
        """Note an operation without a meeting; every rank must, in its place among all."""
        # By an even number, so that the slots go on to take turns.
        self.number = number = self.number + _NUM_SLOTS
        # Whoever sees that sees where this rank has come before.
        self.fence()
        self.own[NEXT] = number + 1

    def agrees(self) -> bool:
        """Whether all brought the digest that this rank brought; for a meeting that is complete."""
        index = self.slot * LINE + DIGEST
        digest = self.own[index]
        return all(flags[index] == digest for flags in self.others)

    def is_marked(self) -> bool:
        """Whether all have marked it; for a meeting that is complete, at which all mean the same."""
        index = self.slot * LINE + _MARK
        return bool(self.own[index]) and all(flags[index] for flags in self.others)

    def end(self) -> None:
        """Say that this rank has written its part of the results."""
        self.fence()
        self.own[self.slot * LINE + _ENDED] = self.number

    def has_ended(self) -> bool:
        """Whether all have said so."""
        index, number = self.slot * LINE + _ENDED, self.number
        for flags in self.others:
            if flags[index] < number:
                return False
        self.fence()
        return True
