"""The rounds of an algorithm as a picture for people: as a table of text, or as SVG."""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction

from mpitrain.schedules.algorithm import Algorithm
from mpitrain.schedules.rounds import Receive, Round, Send
from mpitrain.schedules.svg import Lanes, render

__all__ = ["describe_round", "draw_svg", "draw_text"]


def draw_text(algorithm: Algorithm, size: int, *, root: int = 0, num_segments: int = 1) -> str:
    """Return a table with a row per round and a column per rank.

    `->3 [0:2]` sends chunks 0 and 1 to rank 3; `<-1 [2:4]` receives chunks 2 and 3 from rank 1 in
    place of the local ones, and `<-1 +[2:4]` reduces them into the local ones. A signal has no chunks.
    """
    columns = _rounds_by_rank(algorithm, size, root, num_segments)
    header = ["round", *(f"rank {rank}" for rank in range(size))]
    rows = [
        [str(round_index), *(_cell(current) for current in rounds)]
        for round_index, rounds in enumerate(zip(*columns, strict=True))
    ]
    table = [header, *rows]
    widths = [max(len(cell) for cell in column) for column in zip(*table, strict=True)]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]
    rule = "-+-".join("-" * width for width in widths)
    title = _title(algorithm, size, root, num_segments)
    return "\n".join([title, lines[0], rule, *lines[1:]]) + "\n"


def draw_svg(algorithm: Algorithm, size: int, *, root: int = 0, num_segments: int = 1) -> str:
    """Return a self-contained SVG with a lane per rank and a column per round.

    An arrow goes from the sender's lane to the receiver's. The label behind its head names
    the chunks, as the receiver numbers them, and the sender. The picture is meant for up to 16 ranks.
    """
    columns = _rounds_by_rank(algorithm, size, root, num_segments)
    lanes = Lanes(
        title=_title(algorithm, size, root, num_segments),
        names=[
            f"rank {rank} (root)" if algorithm.takes_root and rank == root else f"rank {rank}" for rank in range(size)
        ],
        rounds=[[current.receives for current in rounds] for rounds in zip(*columns, strict=True)],
    )
    return render(lanes)


def _rounds_by_rank(algorithm: Algorithm, size: int, root: int, num_segments: int) -> list[list[Round]]:
    return [list(algorithm.rounds_of(rank, size, root=root, num_segments=num_segments)) for rank in range(size)]


def _title(algorithm: Algorithm, size: int, root: int, num_segments: int) -> str:
    num_rounds = algorithm.rounds(size, num_segments)
    volume = algorithm.volume(size, num_segments)
    parts = [_counted(size, "rank")]
    if algorithm.takes_root:
        parts.append(f"root {root}")
    if algorithm.takes_segments:
        parts.append(_counted(num_segments, "segment"))
    cost = f"{_counted(num_rounds, 'round')}, {_sent_at_most(volume)}"
    return f"{algorithm.qualified_name}, {', '.join(parts)}: {cost}"


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _sent_at_most(volume: Fraction) -> str:
    if volume == 0:
        return "no data is sent"
    return f"a rank sends at most {'n' if volume == 1 else f'{volume} n'}"


def _cell(current: Round) -> str:
    return "  ".join(describe_round(current))


def describe_round(current: Round) -> list[str]:
    """Return the messages of a rank in one round, in the words of `draw_text`: what it sends, then what it receives."""
    return [*_sent(current.sends), *_received(current.receives)]


def _sent(sends: Iterable[Send]) -> Iterable[str]:
    return (f"->{peer} {_chunks(start, stop)}".rstrip() for peer, start, stop in sends)


def _received(receives: Iterable[Receive]) -> Iterable[str]:
    return (f"<-{peer} {'+' * reduce}{_chunks(start, stop)}".rstrip() for peer, start, stop, reduce in receives)


def _chunks(start: int, stop: int) -> str:
    return f"[{start}:{stop}]" if start < stop else ""
