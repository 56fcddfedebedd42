"""Why ranks of a simulation wait for ever."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

__all__ = ["Waiting", "explain_waiting"]


class Waiting(NamedTuple):
    """A message of `rank` that its `peer` has not matched."""

    rank: int
    peer: int
    round_index: int
    what: str

    def __str__(self) -> str:
        """Return where it is and what is missing."""
        return f"rank {self.rank}, round {self.round_index}, peer {self.peer}: {self.what}"


def explain_waiting(unmatched: Iterable[Waiting], is_done: Sequence[bool]) -> str:
    """Return a message that names what is missing, or the ranks that wait in a cycle."""
    first_of: dict[int, Waiting] = {}
    for waiting in unmatched:
        if is_done[waiting.peer]:
            return f"{waiting}, and the peer is at its end"
        first_of.setdefault(waiting.rank, waiting)
    # All those waited for are waiting themselves, so following them must come back.
    rank = min(first_of)
    visited: list[int] = []
    while rank not in visited:
        visited.append(rank)
        rank = first_of[rank].peer
    cycle = visited[visited.index(rank) :]
    return "deadlock: " + "; ".join(str(first_of[each]) for each in cycle)
