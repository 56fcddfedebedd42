"""What a rank says when it is ready for a named operation, and what is decided about it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from mpitrain.memory import FlatArray

__all__ = ["Announcement", "Decision", "Tensor", "tensors_of"]


class Tensor(NamedTuple):
    """What the other ranks need to know of an array.

    Attributes:
        dtype: Name of the element type.
        shape: Of this rank's array.
    """

    dtype: str
    shape: tuple[int, ...]


def tensors_of(collective: str, views: Iterable[FlatArray]) -> tuple[Tensor, ...]:
    """Describe arrays; what is gathered has rows, so a scalar is one."""
    least = (1,) if collective == "allgather" else ()
    return tuple(Tensor(view.dtype.name, tuple(view.shape) or least) for view in views)


class Announcement(NamedTuple):
    """One rank is ready for one operation.

    Attributes:
        name: Equal on all ranks that mean the same operation; unique among those in flight.
        collective: "allreduce", "allgather", "broadcast", "alltoall", "reduce_scatter" or "barrier"; or one of those
            that move no data, see `joining`.
        tensors: One, or all of a grouped operation; they run together or not at all.
        op: Name of the reduction, "" where there is none.
        root: Rank, -1 where there is none.
        prescale: Factor before the reduction.
        postscale: Factor after it.
        splits: Rows for each rank of an all-to-all.
        problem: Why this rank cannot take part; nothing else about the operation is known then.
    """

    name: str
    collective: str
    tensors: tuple[Tensor, ...] = ()
    op: str = ""
    root: int = -1
    prescale: float = 1.0
    postscale: float = 1.0
    splits: tuple[int, ...] = ()
    problem: str = ""

    def describe(self) -> str:
        """Return one line for messages."""
        if self.problem:
            return f"{self.collective} with unusable arguments: {self.problem}"
        parts = [self.collective]
        if self.op:
            parts.append(self.op)
        if self.tensors:
            parts.append("of " + ", ".join(f"{tensor.dtype} {list(tensor.shape)}" for tensor in self.tensors))
        if self.root >= 0:
            parts.append(f"from root {self.root}")
        if (self.prescale, self.postscale) != (1.0, 1.0):
            parts.append(f"scaled by {self.prescale:g} before and {self.postscale:g} after")
        if self.splits:
            parts.append(f"with splits {list(self.splits)}")
        return " ".join(parts)


class Decision(NamedTuple):
    """What all ranks do next, in the order in which decisions are made.

    Attributes:
        names: Operations to run now, fused into one if there are several.
        error: Instead of running them: why they fail, the same on every rank.
        reason: Kind of the error: "mismatch", "absent", "left", "timeout" or "broken".
        absent: Ranks that have joined. For operations, those of them that have not started it before; they take part
            with what changes nothing. Without operations, all: rank 0 tells that somebody has joined.
        announced: What one of the others has announced for each operation, for the ranks that are absent.
        last: All ranks have joined, this one as the last; -1 if not.
        rows: For an all-gather, the first dimension of each rank's array, for each tensor.
        splits: For an all-to-all, the rows that each rank sends to each rank.
        closed: No further decision will come, because of this; nothing undecided, now or later, can complete.
    """

    names: tuple[str, ...]
    error: str = ""
    reason: str = ""
    rows: tuple[tuple[int, ...], ...] = ()
    splits: tuple[tuple[int, ...], ...] = ()
    closed: str = ""
    absent: tuple[int, ...] = ()
    announced: tuple[Announcement, ...] = ()
    last: int = -1
