"""One collective algorithm: its schedule, and what is claimed about it.

The claims (rounds, volume) are stated as functions and checked against the rounds by
`mpitrain.schedules.prove`; the readable forms stand in `docs/algorithms.md`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import TypeAlias

from mpitrain.schedules.rounds import Round

__all__ = ["Algorithm", "Schedule"]

Schedule: TypeAlias = Callable[..., Iterator[Round]]


@dataclass(frozen=True, kw_only=True)
class Algorithm:
    """A schedule and its properties.

    The functions take `(size, num_segments)`; in the formulas p is the size, s the number
    of segments, and n the bytes of the full buffer.

    Attributes:
        collective: What it computes, a key of `ALGORITHMS`.
        name: Which algorithm it is among those of the collective.
        schedule: The generator, called as `schedule(rank, size[, root][, num_segments])`.
        num_chunks: Into how many chunks the buffer is cut.
        rounds: How many rounds there are; the same on every rank.
        volume: The largest amount that any one rank sends in units of n, when all chunks
            are equal. For an all-to-all n is the send buffer of one rank.
        rounds_formula: `rounds`, readable.
        volume_formula: `volume`, readable.
        restrictions: What the algorithm demands of the size and the operation.
        source: Authors, venue, year, doi.
        takes_root: Whether the schedule has the argument `root`.
        takes_segments: Whether the schedule has the argument `num_segments`.
        is_symmetric: Whether all ranks do the same: in each round, rank r sends, receives
            and reduces as many chunks to and from rank r + d (modulo p) as rank 0 does
            to and from rank d.
        renumbers_chunks: Whether the receiver stores a message under other chunk numbers than
            the sender reads it from. Sent and received chunks then pair by position.
    """

    collective: str
    name: str
    schedule: Schedule
    num_chunks: Callable[[int, int], int]
    rounds: Callable[[int, int], int]
    volume: Callable[[int, int], Fraction]
    rounds_formula: str
    volume_formula: str
    restrictions: str
    source: str
    takes_root: bool = False
    takes_segments: bool = False
    is_symmetric: bool = False
    renumbers_chunks: bool = False

    @property
    def qualified_name(self) -> str:
        """The name of the schedule, such as `allreduce_ring`."""
        return f"{self.collective}_{self.name}"

    def chunks_per_buffer(self, size: int, num_segments: int = 1) -> int:
        """Return how many chunks make up the n bytes in which volume is counted."""
        # The chunk space of an all-to-all holds two buffers, the sent and the received one.
        num_chunks = self.num_chunks(size, num_segments)
        return num_chunks // 2 if self.renumbers_chunks else num_chunks

    def rounds_of(self, rank: int, size: int, *, root: int = 0, num_segments: int = 1) -> Iterator[Round]:
        """Yield the rounds of `rank`; arguments that the schedule does not take are dropped.

        Raises:
            ValueError: An argument is out of range (on every rank, except for `rank`).
        """
        _check_range("size", size, 1, None)
        _check_range("rank", rank, 0, size)
        _check_range("root", root, 0, size)
        _check_range("num_segments", num_segments, 1, None)
        arguments = [rank, size]
        if self.takes_root:
            arguments.append(root)
        if self.takes_segments:
            arguments.append(num_segments)
        return self.schedule(*arguments)


def _check_range(name: str, value: int, low: int, end: int | None) -> None:
    if value < low or (end is not None and value >= end):
        remedy = f"at least {low}" if end is None else f"from {low} to {end - 1}"
        raise ValueError(f"{name}: out of range, got {value}; pass one {remedy}")
