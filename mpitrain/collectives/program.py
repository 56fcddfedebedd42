"""A schedule compiled for one rank and one layout: transfers of memory and what each waits for.

The rounds of a schedule say in which order things *mean* to happen. To keep the network busy while
reductions run, a program drops the rounds and keeps only what must be ordered: messages are cut into
segments, and a segment may be sent as soon as the transfers that produce its bytes are done,
whichever rounds they belong to.

Why that cannot deadlock: receives are posted in program order and sends to one peer too, so
messages match as in the schedule. Take the messages in any order in which the (deadlock-free)
schedule can run. The first one that is not done has all its predecessors done, on both of its ends, so it has been
posted on both, and it will be done.

The memory in which segments wait to be reduced is the one thing besides. A rank that exchanges what it reduces with
several peers in one round could fill it with segments that wait for its own sends, to peers in the same position;
so a program says how many such segments there must be room for.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from mpitrain.collectives.layout import Layout
from mpitrain.schedules import Algorithm, Receive, Round, Send

__all__ = ["Program", "Transfer", "compile_program", "compile_rounds", "touched_chunks"]


class Transfer(NamedTuple):
    """One message segment: `count` elements at `offset` of array number `array`.

    Attributes:
        peer: Who gets it, or whom it comes from.
        is_send: Send, else receive.
        reduce: Reduce what is received into the array instead of replacing.
        releases: Indices of later transfers that wait for this one.
    """

    peer: int
    is_send: bool
    reduce: bool
    array: int
    offset: int
    count: int  # type: ignore[assignment]  # a tuple's own method, which nobody needs here
    releases: tuple[int, ...]


class Program(NamedTuple):
    """All transfers of one rank in one collective, in program order.

    Attributes:
        transfers: In the order of the rounds; sends of a round come before its receives.
        waits: For each transfer, how many earlier ones must be done before it may touch its memory.
        sends: Indices of the sends, for each peer in program order.
        receives: Indices of the receives, in program order.
        num_rounds: Rounds of the schedule it was made from.
        num_reduces: How many segments are reduced.
        largest_reduce_count: Elements of the largest segment that is reduced; 0 if none is.
        least_slots: How many segments that wait to be reduced there must be room for.
    """

    transfers: tuple[Transfer, ...]
    waits: tuple[int, ...]
    sends: tuple[tuple[int, ...], ...]
    receives: tuple[int, ...]
    num_rounds: int
    num_reduces: int
    largest_reduce_count: int
    least_slots: int

    @property
    def writes(self) -> bool:
        """Whether this rank receives anything."""
        return bool(self.receives)


class _Piece(NamedTuple):
    peer: int
    is_send: bool
    reduce: bool
    array: int
    offset: int
    count: int  # type: ignore[assignment]  # a tuple's own method, which nobody needs here


@functools.lru_cache(maxsize=1024)
def compile_program(
    algorithm: Algorithm,
    rank: int,
    size: int,
    layout: Layout,
    segment_count: int,
    *,
    root: int = 0,
    num_segments: int = 1,
) -> Program:
    """Compile the schedule of one rank.

    Args:
        algorithm: From the registry of schedules.
        rank: The rank to compile for.
        size: Number of ranks.
        layout: Where the chunks are; counts are the same on every rank that touches them.
        segment_count: Longest message in elements; same on every rank.
        root: Same on every rank; ignored by algorithms without one.
        num_segments: For algorithms that pipeline by themselves; same on every rank.
    """
    rounds = algorithm.rounds_of(rank, size, root=root, num_segments=num_segments)
    return compile_rounds(list(rounds), layout, segment_count)


def compile_rounds(rounds: Sequence[Round], layout: Layout, segment_count: int) -> Program:
    """Compile rounds of one rank that are no schedule of their own; the arguments are those of `compile_program`."""
    pieces = [piece for a_round in rounds for piece in _pieces(a_round, layout, segment_count)]
    waits, releases = _dependencies(pieces)
    reduce_counts = [piece.count for piece in pieces if piece.reduce]
    sends: dict[int, list[int]] = defaultdict(list)
    receives: list[int] = []
    for index, piece in enumerate(pieces):
        if piece.is_send:
            sends[piece.peer].append(index)
        else:
            receives.append(index)
    return Program(
        transfers=tuple(Transfer(*piece, tuple(released)) for piece, released in zip(pieces, releases, strict=True)),
        waits=tuple(waits),
        sends=tuple(tuple(queue) for queue in sends.values()),
        receives=tuple(receives),
        num_rounds=len(rounds),
        num_reduces=len(reduce_counts),
        largest_reduce_count=max(reduce_counts, default=0),
        least_slots=max((_least_slots(a_round, layout, segment_count) for a_round in rounds), default=0),
    )


def touched_chunks(algorithm: Algorithm, rank: int, size: int, root: int) -> frozenset[int]:
    """Chunks that this rank sends or receives, for algorithms whose layout is compact."""
    return frozenset(
        chunk
        for a_round in algorithm.rounds_of(rank, size, root=root)
        for message in _messages(a_round)
        for chunk in range(message.start, message.stop)
    )


def _pieces(a_round: Round, layout: Layout, segment_count: int) -> Iterator[_Piece]:
    """Cut the messages of a round into segments, the same way on both of their ends."""
    for message in _messages(a_round):
        peer, is_send = message.peer, isinstance(message, Send)
        reduce = isinstance(message, Receive) and message.reduce
        if message.start == message.stop:  # a bare signal
            yield _Piece(peer, is_send, reduce, -1, 0, 0)
            continue
        array, offset, count = layout.span(message.start, message.stop)
        for begin in range(0, count, segment_count):
            length = min(segment_count, count - begin)
            yield _Piece(peer, is_send, reduce, array, offset + begin, length)


def _messages(a_round: Round) -> list[Send | Receive]:
    return [*a_round.sends, *a_round.receives]


def _least_slots(a_round: Round, layout: Layout, segment_count: int) -> int:
    reduces = [receive for receive in a_round.receives if receive.reduce]
    # From one peer, segments come in the order in which they are waited for, so one slot will do.
    if len({receive.peer for receive in reduces}) <= 1:
        return 0
    if not any(send.start < each.stop and each.start < send.stop for send in a_round.sends for each in reduces):
        return 0
    return sum(piece.reduce for piece in _pieces(a_round, layout, segment_count))


def _dependencies(pieces: list[_Piece]) -> tuple[list[int], list[list[int]]]:
    """For each piece: how many earlier ones it waits for, and which later ones wait for it.

    Arrays are cut at every boundary of a piece into cells, so that pieces overlap exactly where they share cells.
    A send waits for the last writer of its cells; a receive also for the sends that still read them.
    """
    cuts: dict[int, set[int]] = defaultdict(set)
    for piece in pieces:
        cuts[piece.array] |= {piece.offset, piece.offset + piece.count}
    ordered = {array: sorted(offsets) for array, offsets in cuts.items()}
    position = {array: {offset: cell for cell, offset in enumerate(offsets)} for array, offsets in ordered.items()}
    writer: dict[tuple[int, int], int] = {}
    readers: dict[tuple[int, int], list[int]] = defaultdict(list)
    waits = [0] * len(pieces)
    releases: list[list[int]] = [[] for _ in pieces]
    for index, piece in enumerate(pieces):
        where = position[piece.array]
        # Signals carry no memory; they share one imaginary cell, so that each follows all before it.
        cells = range(1) if piece.array < 0 else range(where[piece.offset], where[piece.offset + piece.count])
        before: set[int] = set()
        for number in cells:
            cell = (piece.array, number)
            if cell in writer:
                before.add(writer[cell])
            if piece.is_send:
                readers[cell].append(index)
            else:
                if piece.array >= 0:
                    before.update(readers.pop(cell, ()))
                writer[cell] = index
        waits[index] = len(before)
        for earlier in before:
            releases[earlier].append(index)
    return waits, releases
