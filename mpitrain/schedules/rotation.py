"""Rotated ranks and chunks: what is described for root 0 serves any root.

Terms: `vrank` is the rank rotated so that the root is 0: vrank = (rank - root) mod size.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from mpitrain.schedules.rounds import Receive, Round, Send

__all__ = ["rotate_peers", "rotate_peers_and_chunks", "to_vrank", "wrapped_ranges"]


def to_vrank(rank: int, root: int, size: int) -> int:
    """Return the place of `rank` when counting from `root`."""
    return (rank - root) % size


def wrapped_ranges(first: int, count: int, size: int) -> list[tuple[int, int]]:
    """Return `count` chunks from `first` on, modulo `size`, as one or two ranges."""
    start = first % size
    stop = start + count
    if stop <= size:
        return [(start, stop)]
    return [(start, size), (0, stop - size)]


def rotate_peers(rounds: Iterable[Round], root: int, size: int) -> Iterator[Round]:
    """Yield rounds given in vranks with ranks in their place; the chunks stay."""
    for sends, receives in rounds:
        yield Round(
            sends=tuple(Send((peer + root) % size, start, stop) for peer, start, stop in sends),
            receives=tuple(
                Receive((peer + root) % size, start, stop, reduce) for peer, start, stop, reduce in receives
            ),
        )


def rotate_peers_and_chunks(rounds: Iterable[Round], root: int, size: int) -> Iterator[Round]:
    """Yield rounds given in vranks, where chunk v belongs to vrank v, in ranks.

    A range that wraps around the end of the buffer becomes two messages of the round.
    """
    for sends, receives in rounds:
        yield Round(
            sends=tuple(
                Send((peer + root) % size, *chunks)
                for peer, start, stop in sends
                for chunks in wrapped_ranges(start + root, stop - start, size)
            ),
            receives=tuple(
                Receive((peer + root) % size, *chunks, reduce)
                for peer, start, stop, reduce in receives
                for chunks in wrapped_ranges(start + root, stop - start, size)
            ),
        )
