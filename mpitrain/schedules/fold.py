"""The fold to a power of two: what lets algorithms on powers of two run on any size.

Terms: `core_size` is the largest power of two that is not above `size`, and
e = `size - core_size` ranks are too many. The first 2e ranks form e pairs of neighbours (2i, 2i+1).
The odd rank of a pair is the *extra*; it hands its data to the even one, waits, and is given
the result. The even ranks of the pairs and all ranks from 2e on are the *core*, numbered
from 0 in order, so that core i stands for a group of one or two consecutive ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from mpitrain.schedules.rounds import Receive, Round, Send

__all__ = ["Fold", "floor_log2", "is_power_of_two"]


def floor_log2(number: int) -> int:
    """Return the largest m with 2**m <= `number`, which must be positive."""
    return number.bit_length() - 1


def is_power_of_two(number: int) -> bool:
    """Return whether `number`, which must be positive, has a single bit."""
    return number & (number - 1) == 0


class Fold(NamedTuple):
    """The place of one rank in the fold."""

    rank: int
    core_size: int
    num_extras: int

    @classmethod
    def of(cls, rank: int, size: int) -> Fold:
        """Return the place of `rank` among `size` ranks."""
        core_size = 1 << floor_log2(size)
        return cls(rank, core_size, size - core_size)

    @property
    def is_paired(self) -> bool:
        """Whether the rank is an extra, or a core rank that has one."""
        return self.rank < 2 * self.num_extras

    @property
    def is_extra(self) -> bool:
        """Whether the rank sits out between `fold_in` and `fold_out`."""
        return self.is_paired and self.rank % 2 == 1

    @property
    def extra(self) -> int:
        """The extra of this rank's pair."""
        return self.rank | 1

    @property
    def core(self) -> int:
        """The number of the rank, or of its pair, in the core."""
        return self.rank // 2 if self.is_paired else self.rank - self.num_extras

    @property
    def num_doublings(self) -> int:
        """How often 1 must be doubled to become `core_size`."""
        return floor_log2(self.core_size)

    def rank_of(self, core: int) -> int:
        """Return the first rank of the group of `core`, which is its core rank.

        With `core_size` the result is `size`, so that the group of any core ends where
        that of the next one begins.
        """
        return 2 * core if core < self.num_extras else core + self.num_extras

    def fold_in(self, start: int, stop: int, *, reduce: bool) -> Iterator[Round]:
        """Yield the round, if one is needed, that brings chunks of the extras to the core."""
        if self.num_extras:
            yield self._pair_round(start, stop, sender_is_extra=True, reduce=reduce)

    def fold_out(self, start: int, stop: int) -> Iterator[Round]:
        """Yield the round, if one is needed, that brings chunks of the core to the extras."""
        if self.num_extras:
            yield self._pair_round(start, stop, sender_is_extra=False, reduce=False)

    def _pair_round(self, start: int, stop: int, *, sender_is_extra: bool, reduce: bool) -> Round:
        if not self.is_paired:
            return Round()
        partner = self.rank ^ 1
        if self.is_extra == sender_is_extra:
            return Round(sends=(Send(partner, start, stop),))
        return Round(receives=(Receive(partner, start, stop, reduce),))
