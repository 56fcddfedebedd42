"""Named operations that some ranks do not start: warnings, and an end after a set time."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import NamedTuple

from mpitrain.config import PREFIX, Settings
from mpitrain.negotiation.announcement import Decision
from mpitrain.negotiation.coordinator import Coordinator

__all__ = ["StallWatch", "Waiting"]

_log = logging.getLogger("mpitrain")

_INTERVAL_S = 0.25
# Rank 0 knows who is missing, so the others leave it a moment to say so before they give up by themselves.
_GRACE_S = 2.0


_UNDECIDED = "was not decided by rank 0"
_BEHIND = "waits behind a call that was refused here, and that the other ranks have not made"


class Waiting(NamedTuple):
    """Operations of a rank that are not decided, each with the time since when.

    Attributes:
        undecided: Announced.
        behind: To be announced after a refusal of the same name.
    """

    undecided: list[tuple[str, float]]
    behind: list[tuple[str, float]]


class StallWatch:
    """Looks now and then for operations that are not complete after long.

    Args:
        settings: Time limits.
        rank: This rank, for messages.
        size: Number of ranks.
    """

    def __init__(self, settings: Settings, rank: int, size: int) -> None:
        self._warning_s = settings.stall_warning_s
        limits = {"stall_shutdown_s": settings.stall_shutdown_s, "timeout_s": settings.timeout_s}
        # The earlier one; they differ in what else ends.
        self._limit_s, self._setting = min(
            ((limit_s, name) for name, limit_s in limits.items() if limit_s), default=(0.0, "")
        )
        self.reason = "stalled" if self._setting == "stall_shutdown_s" else "timeout"
        self._rank, self._size = rank, size
        self._where = f"r{rank}/{size}"
        self._next_s = 0.0

    def inspect(self, coordinator: Coordinator, waiting: Callable[[], Waiting], now_s: float) -> list[Decision]:
        """On rank 0: warn of operations that some ranks do not start, and end everything if one is overdue.

        Args:
            coordinator: Knows all that was announced.
            waiting: Returns what waits on this rank.
            now_s: By the same clock.
        """
        if not self._is_due(now_s):
            return []
        if self._warning_s:
            for line in coordinator.stalled(self._warning_s, now_s):
                _log.warning("%s | %s", self._where, line)
        if not self._limit_s:
            return []
        reasons = coordinator.overdue(self._limit_s, now_s) or _overdue(waiting().behind, _BEHIND, self._limit_s, now_s)
        return [Decision((), reason=self.reason, closed=f"{reason}; {self._remedy()}") for reason in reasons]

    def inspect_alone(self, waiting: Callable[[], Waiting], now_s: float) -> str:
        """On the other ranks: return why to give up, if rank 0 itself starts nothing and so decides nothing.

        Args:
            waiting: Returns what waits on this rank.
            now_s: By the same clock.
        """
        if not self._limit_s or not self._is_due(now_s):
            return ""
        limit_s = self._limit_s + _GRACE_S
        undecided, behind = waiting()
        reasons = _overdue(undecided, _UNDECIDED, limit_s, now_s) or _overdue(behind, _BEHIND, limit_s, now_s)
        return f"{reasons[0]}; {self._remedy()}" if reasons else ""

    def watch(self, name: str, since_s: float) -> Callable[[list[int], float], str]:
        """Return what looks after one operation of which this rank sees by itself who has not started it.

        It is told these ranks, and the time, and returns why to give up, "" if there is no reason.
        """
        warned_s = since_s

        def inspect(missing: list[int], now_s: float) -> str:
            nonlocal warned_s
            if not missing:
                return ""  # the last one has come by now
            if 0 < self._warning_s < now_s - warned_s:
                warned_s = now_s
                started = [rank for rank in range(self._size) if rank not in missing]
                if started[0] == self._rank:
                    waited = f"waits since {now_s - since_s:.0f} s for ranks {missing}; started by ranks {started}"
                    _log.warning("%s | %s: %s", self._where, name, waited)
            if 0 < self._limit_s < now_s - since_s:
                return f"{name} was not started by ranks {missing} within {self._limit_s:g} s; {self._remedy()}"
            return ""

        return inspect

    def _is_due(self, now_s: float) -> bool:
        if now_s < self._next_s:
            return False
        self._next_s = now_s + _INTERVAL_S
        return True

    def _remedy(self) -> str:
        return f"see what these ranks do instead, or raise {PREFIX}{self._setting.upper()}"


def _overdue(operations: list[tuple[str, float]], what: str, limit_s: float, now_s: float) -> list[str]:
    names = [name for name, since_s in operations if now_s - since_s > limit_s]
    return [f"{names[0]} {what} within {limit_s:g} s"] if names else []
