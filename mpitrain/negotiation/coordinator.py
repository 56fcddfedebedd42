"""Decides, on rank 0, which named operations run next: those that all ranks have announced, in one order.

Pure: announcements and times in, decisions out.
"""

from __future__ import annotations

import dataclasses
import math

from mpitrain.negotiation.agreement import find_mismatch
from mpitrain.negotiation.announcement import Announcement, Decision
from mpitrain.negotiation.joining import JOIN, STEP_END, find_absence_problem

__all__ = ["Coordinator"]


@dataclasses.dataclass(slots=True)
class _Pending:
    since_s: float
    announcements: dict[int, Announcement] = dataclasses.field(default_factory=dict)
    warned_s: float = -math.inf

    @property
    def is_waited_for(self) -> bool:
        """Whether a rank has started it; who has refused it waits for nothing."""
        return any(not announcement.problem for announcement in self.announcements.values())

    def note(self, rank: int, announcement: Announcement, now_s: float) -> None:
        if not announcement.problem and not self.is_waited_for:
            self.since_s, self.warned_s = now_s, -math.inf
        self.announcements[rank] = announcement

    def refusals(self) -> str:
        """Say who has refused it, and why; nothing if nobody has."""
        return ", ".join(
            f"refused by rank {rank}: {announcement.problem}"
            for rank, announcement in sorted(self.announcements.items())
            if announcement.problem
        )


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
        self._closing: Decision | None = None
        # In the order in which they joined; and whether the ranks do not know of one yet.
        self._joined: list[int] = []
        self._is_untold = False

    def announce(self, rank: int, announcement: Announcement, now_s: float) -> None:
        """Note that a rank is ready for an operation, or has joined, or takes back a step that has ended."""
        if announcement.collective == JOIN:
            self._joined.append(rank)
            self._is_untold = True
            self._complete += [
                name
                for name, pending in self._pending.items()
                if name not in self._complete and self._is_complete(pending)
            ]
            return
        if announcement.collective == STEP_END:
            self._take_back(rank, announcement.name)
            return
        pending = self._pending.setdefault(announcement.name, _Pending(now_s))
        pending.note(rank, announcement, now_s)
        if self._is_complete(pending):
            self._complete.append(announcement.name)

    def _take_back(self, rank: int, name: str) -> None:
        pending = self._pending.get(name)
        # What is complete is decided all the same, which does no harm.
        if pending is not None and name not in self._complete:
            pending.announcements.pop(rank, None)
            if not pending.announcements:
                del self._pending[name]

    def leave(self, rank: int, reason: str) -> None:
        """Note that a rank takes part in nothing any more."""
        self._left[rank] = reason

    def close(self, closing: Decision) -> None:
        """Note that a rank has seen why nothing can go on."""
        self._closing = closing

    def decide(self) -> list[Decision]:
        """Take what is ready, and what can never be, as decisions for all ranks."""
        if self._left or self._closing is not None:
            return self._end()
        decisions: list[Decision] = []
        if self._is_untold and len(self._joined) < self._size:
            decisions.append(Decision((), absent=tuple(sorted(self._joined))))
        self._is_untold = False
        ready: list[tuple[Announcement, tuple[int, ...]]] = []
        for name in self._complete:
            announcements = self._pending.pop(name).announcements
            absent = tuple(sorted(rank for rank in self._joined if rank not in announcements))
            first = announcements[min(announcements)]
            if error := find_mismatch(announcements):
                decisions.append(Decision((name,), error, "mismatch"))
            elif absent and (error := find_absence_problem(announcements, absent)):
                decisions.append(Decision((name,), error, "absent"))
            elif first.collective == "allreduce":
                ready.append((first, absent))
            else:
                decisions.append(self._alone(announcements, absent))
        self._complete = []
        decisions += self._fuse(ready)
        if len(self._joined) == self._size:
            # Whoever starts something now has learned before that all have joined, so nothing is pending.
            decisions.append(Decision((JOIN,), last=self._joined[-1]))
            self._joined = []
        return decisions

    def _end(self) -> list[Decision]:
        """Close everything, as every operation needs every rank.

        Also what is complete by now: who left does not wait for it any more. To end only what waits by now would
        leave a rank that starts a moment later waiting for a decision, if nobody looks for announcements any more.
        """
        reasons = [f"rank {rank} {reason}" for rank, reason in self._left.items()]
        closing = self._closing or Decision((), reason="left", closed="; ".join(reasons))
        self._left = {}
        self._closing = None
        self._pending = {}
        self._complete = []
        return [closing]

    def overdue(self, limit_s: float, now_s: float) -> list[str]:
        """Return why everything has to end, if operations have been incomplete for longer than `limit_s`; one reason.

        No rank may go on after that: one that is late would meet an operation that the others have given up.
        """
        reasons = [
            f"{name} was not started by ranks {self._missing(pending)} within {limit_s:g} s"
            + (f", and was {refusals}" if (refusals := pending.refusals()) else "")
            for name, pending in self._pending.items()
            if pending.is_waited_for and now_s - pending.since_s > limit_s
        ]
        return ["; ".join(reasons)] if reasons else []

    def stalled(self, limit_s: float, now_s: float) -> list[str]:
        """Return a line for each operation that has been incomplete for longer than `limit_s`; again after as long.

        Of one that was refused, and that nobody waits for, once.
        """
        lines = []
        for name, pending in self._pending.items():
            if now_s - pending.since_s > limit_s and now_s - pending.warned_s > limit_s:
                pending.warned_s = now_s if pending.is_waited_for else math.inf
                lines.append(self._describe(name, pending, now_s))
        return lines

    def _describe(self, name: str, pending: _Pending, now_s: float) -> str:
        missing, refusals = self._missing(pending), pending.refusals()
        if not pending.is_waited_for:
            return f"{name}: not started, as it was {refusals}; ranks {missing} have not called it"
        started = sorted(rank for rank, announcement in pending.announcements.items() if not announcement.problem)
        line = f"{name}: waits since {now_s - pending.since_s:.0f} s for ranks {missing}; started by ranks {started}"
        joined = f"ranks {sorted(self._joined)} have joined" if self._joined else ""
        return ", ".join(filter(None, (line, refusals, joined)))

    def _is_complete(self, pending: _Pending) -> bool:
        num_absent = sum(rank not in pending.announcements for rank in self._joined)
        return len(pending.announcements) + num_absent == self._size

    def _missing(self, pending: _Pending) -> list[int]:
        """Return the ranks that an operation still waits for."""
        return [rank for rank in range(self._size) if rank not in pending.announcements and rank not in self._joined]

    def _alone(self, announcements: dict[int, Announcement], absent: tuple[int, ...]) -> Decision:
        """Return the decision for an operation that is never fused, with what its ranks must know of each other."""
        first = announcements[min(announcements)]
        rows: tuple[tuple[int, ...], ...] = ()
        splits: tuple[tuple[int, ...], ...] = ()
        if first.collective == "allgather":
            rows = tuple(
                tuple(
                    announcements[rank].tensors[index].shape[0] if rank in announcements else 0
                    for rank in range(self._size)
                )
                for index in range(len(first.tensors))
            )
        elif first.collective == "alltoall":
            nothing = (0,) * self._size
            splits = tuple(
                announcements[rank].splits if rank in announcements else nothing for rank in range(self._size)
            )
        announced = (first,) if absent else ()
        return Decision((first.name,), rows=rows, splits=splits, absent=absent, announced=announced)

    def _fuse(self, ready: list[tuple[Announcement, tuple[int, ...]]]) -> list[Decision]:
        """Join all-reduces that may share one buffer, in the order in which they became ready."""
        groups: dict[object, list[Announcement]] = {}
        nbytes_of: dict[object, int] = {}
        decisions: list[tuple[list[Announcement], tuple[int, ...]]] = []
        for announcement, absent in ready:
            nbytes = self._nbytes(announcement)
            dtypes = {tensor.dtype for tensor in announcement.tensors}
            key = (announcement.op, announcement.prescale, announcement.postscale, absent, *dtypes)
            fused = groups.get(key)
            if fused is None or len(dtypes) > 1 or nbytes_of[key] + nbytes > self._fusion_nbytes:
                groups[key] = fused = []
                nbytes_of[key] = 0
                decisions.append((fused, absent))
            fused.append(announcement)
            nbytes_of[key] += nbytes
        return [
            Decision(
                tuple(announcement.name for announcement in fused),
                absent=absent,
                announced=tuple(fused) if absent else (),
            )
            for fused, absent in decisions
        ]

    def _nbytes(self, announcement: Announcement) -> int:
        total = 0
        for tensor in announcement.tensors:
            count = 1
            for length in tensor.shape:
                count *= length
            total += count * self._itemsizes[tensor.dtype]
        return total
