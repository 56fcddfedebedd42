"""Decides, on rank 0, which named operations run next: those that all ranks have announced, in one order.

Pure: announcements and times in, decisions out.
"""

from __future__ import annotations

import dataclasses

from mpitrain.negotiation.agreement import find_mismatch
from mpitrain.negotiation.announcement import Announcement, Decision

__all__ = ["Coordinator"]


@dataclasses.dataclass(slots=True)
class _Pending:
    since_s: float
    announcements: dict[int, Announcement] = dataclasses.field(default_factory=dict)
    warned: bool = False


class Coordinator:
    """Collects announcements and makes decisions.

    Args:
        size: Number of ranks that take part.
        fusion_nbytes: All-reduces that are ready together are fused up to this size.
        itemsizes: Bytes of an element of each dtype.
    """

    def __init__(self, size: int, fusion_nbytes: int, itemsizes: dict[str, int]) -> None:
        self._size = size
        self._fusion_nbytes = fusion_nbytes
        self._itemsizes = itemsizes
        self._pending: dict[str, _Pending] = {}
        self._complete: list[str] = []
        self._left: dict[int, str] = {}

    def announce(self, rank: int, announcement: Announcement, now_s: float) -> None:
        """Note that a rank is ready for an operation."""
        pending = self._pending.setdefault(announcement.name, _Pending(now_s))
        pending.announcements[rank] = announcement
        if len(pending.announcements) == self._size:
            self._complete.append(announcement.name)

    def leave(self, rank: int, reason: str) -> None:
        """Note that a rank takes part in nothing any more."""
        self._left[rank] = reason

    def decide(self) -> list[Decision]:
        """Take what is ready, and what can never be, as decisions for all ranks."""
        if self._left:
            return self._end()
        decisions: list[Decision] = []
        ready: list[Announcement] = []
        for name in self._complete:
            announcements = self._pending.pop(name).announcements
            error = find_mismatch(announcements)
            if error:
                decisions.append(Decision((name,), error, "mismatch"))
            elif announcements[0].collective == "allreduce":
                ready.append(announcements[0])
            else:
                decisions.append(_alone(announcements))
        self._complete = []
        return decisions + self._fuse(ready)

    def _end(self) -> list[Decision]:
        """Close everything, as every operation needs every rank.

        Also what is complete by now: who left does not wait for it any more. To end only what waits by now would
        leave a rank that starts a moment later waiting for a decision, if nobody looks for announcements any more.
        """
        reasons = [f"rank {rank} {reason}" for rank, reason in self._left.items()]
        self._left = {}
        self._pending = {}
        self._complete = []
        return [Decision((), reason="left", closed="; ".join(reasons))]

    def overdue(self, limit_s: float, now_s: float) -> list[Decision]:
        """Return the decision that ends everything, if an operation has been incomplete for longer than `limit_s`.

        No rank may go on after that: one that is late would meet an operation that the others have given up.
        """
        reasons = [
            f"{name} was not started by {self._missing(pending)} within {limit_s:g} s"
            for name, pending in self._pending.items()
            if now_s - pending.since_s > limit_s
        ]
        return [Decision((), reason="timeout", closed="; ".join(reasons))] if reasons else []

    def stalled(self, limit_s: float, now_s: float) -> list[str]:
        """Return a line, once, for each operation that has been incomplete for longer than `limit_s`."""
        lines = []
        for name, pending in self._pending.items():
            if now_s - pending.since_s > limit_s and not pending.warned:
                pending.warned = True
                lines.append(f"{name}: waits since {now_s - pending.since_s:.0f} s for {self._missing(pending)}")
        return lines

    def _missing(self, pending: _Pending) -> str:
        return f"ranks {[rank for rank in range(self._size) if rank not in pending.announcements]}"

    def _fuse(self, ready: list[Announcement]) -> list[Decision]:
        """Join all-reduces that may share one buffer, in the order in which they became ready."""
        groups: dict[object, list[str]] = {}
        nbytes_of: dict[object, int] = {}
        decisions: list[list[str]] = []
        for announcement in ready:
            nbytes = self._nbytes(announcement)
            dtypes = {tensor.dtype for tensor in announcement.tensors}
            key = (announcement.op, announcement.prescale, announcement.postscale, *dtypes)
            names = groups.get(key)
            if names is None or len(dtypes) > 1 or nbytes_of[key] + nbytes > self._fusion_nbytes:
                groups[key] = names = []
                nbytes_of[key] = 0
                decisions.append(names)
            names.append(announcement.name)
            nbytes_of[key] += nbytes
        return [Decision(tuple(names)) for names in decisions]

    def _nbytes(self, announcement: Announcement) -> int:
        total = 0
        for tensor in announcement.tensors:
            count = 1
            for length in tensor.shape:
                count *= length
            total += count * self._itemsizes[tensor.dtype]
        return total


def _alone(announcements: dict[int, Announcement]) -> Decision:
    """Return the decision for an operation that is never fused, with what its ranks must know of each other."""
    ordered = [announcements[rank] for rank in sorted(announcements)]
    first = ordered[0]
    rows: tuple[tuple[int, ...], ...] = ()
    splits: tuple[tuple[int, ...], ...] = ()
    if first.collective == "allgather":
        rows = tuple(
            tuple(announcement.tensors[index].shape[0] for announcement in ordered)
            for index in range(len(first.tensors))
        )
    elif first.collective == "alltoall":
        splits = tuple(announcement.splits for announcement in ordered)
    return Decision((first.name,), rows=rows, splits=splits)
