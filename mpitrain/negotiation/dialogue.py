"""What the ranks of a group say to one another about named operations: announcements to rank 0, decisions from it.

Nothing is waited for here, and nothing that was said is carried out.
"""

from __future__ import annotations

import pickle
import time
from collections import deque
from collections.abc import Callable

from mpitrain.comm import Transport
from mpitrain.config import Settings
from mpitrain.memory import DTYPES
from mpitrain.negotiation.announcement import Announcement, Decision
from mpitrain.negotiation.coordinator import Coordinator
from mpitrain.negotiation.stalls import StallWatch, Waiting

__all__ = ["Dialogue"]

_COORDINATOR = 0


class Dialogue:
    """One rank's part of it; on rank 0 with the `Coordinator`.

    Args:
        transport: Carries nothing else.
        settings: Of the group.

    Attributes:
        stalls: Looks after what waits for too long.
    """

    def __init__(self, transport: Transport, settings: Settings) -> None:
        self._transport = transport
        self.stalls = StallWatch(settings, transport.rank, transport.size)
        self._coordinator: Coordinator | None = None
        if transport.rank == _COORDINATOR:
            itemsizes = {name: dtype.itemsize for name, dtype in DTYPES.items()}
            self._coordinator = Coordinator(transport.size, settings.fusion_nbytes, itemsizes)
        # Of the coordinator's own rank; filled by the threads that start operations, emptied by the one that serves.
        self._own: deque[Announcement] = deque()

    @property
    def decides(self) -> bool:
        """Whether this rank decides for all."""
        return self._coordinator is not None

    def announce(self, announcement: Announcement) -> None:
        """Say that this rank is ready for an operation; from any thread.

        Raises:
            CommError: It cannot be said.
        """
        if self._coordinator is not None:
            self._own.append(announcement)
        else:
            self._transport.notify(_COORDINATOR, pickle.dumps(announcement))

    def tell_of_leaving(self, reason: str) -> None:
        """Say that this rank takes part in nothing any more.

        Raises:
            CommError: It cannot be said.
        """
        if self._coordinator is not None:
            self._broadcast([Decision((), reason="left", closed=f"rank {self._transport.rank} {reason}")])
        else:
            self._transport.notify(_COORDINATOR, pickle.dumps(reason))

    def tell_of_end(self, closing: Decision) -> None:
        """Have all ranks end what is undecided, for what this rank has seen.

        Raises:
            CommError: It cannot be said.
        """
        if self._coordinator is not None:
            self._broadcast([closing])
        else:
            self._transport.notify(_COORDINATOR, pickle.dumps(closing))

    def hear(self, waiting: Callable[[], Waiting]) -> tuple[bool, list[Decision]]:
        """Take what has come, and give up what waits for too long; for one thread at a time.

        Args:
            waiting: Returns what waits on this rank.

        Returns:
            Whether anything has come or was decided, and what this rank has to carry out, in this order.

        Raises:
            CommError: What has come cannot be taken, or what was decided cannot be said.
        """
        return self._obey(waiting) if self._coordinator is None else self._coordinate(self._coordinator, waiting)

    def _coordinate(self, coordinator: Coordinator, waiting: Callable[[], Waiting]) -> tuple[bool, list[Decision]]:
        now_s = time.monotonic()
        own = [self._own.popleft() for _ in range(len(self._own))]
        for announcement in own:
            coordinator.announce(self._transport.rank, announcement, now_s)
        notices = self._transport.notices()
        for rank, data in notices:
            message = pickle.loads(data)
            if isinstance(message, str):
                coordinator.leave(rank, message)
            elif isinstance(message, Decision):
                coordinator.close(message)
            else:
                coordinator.announce(rank, message, now_s)
        if own or notices:
            # More may be on the way: what becomes ready together is fused.
            return True, []
        decisions = coordinator.decide() + self.stalls.inspect(coordinator, waiting, now_s)
        if decisions:
            self._broadcast(decisions)
        return bool(decisions), decisions

    def _broadcast(self, decisions: list[Decision]) -> None:
        data = pickle.dumps(decisions)
        for rank in range(self._transport.size):
            if rank != _COORDINATOR:
                self._transport.notify(rank, data)

    def _obey(self, waiting: Callable[[], Waiting]) -> tuple[bool, list[Decision]]:
        notices = self._transport.notices()
        decisions: list[Decision] = [decision for _, data in notices for decision in pickle.loads(data)]
        if not notices and (reason := self.stalls.inspect_alone(waiting, time.monotonic())):
            self.tell_of_leaving(f"has given up: {reason}")
            decisions = [Decision((), reason=self.stalls.reason, closed=reason)]
        return bool(notices), decisions

    def free(self) -> None:
        """Release the transport. Every rank must call, when no operation is in flight."""
        self._transport.free()
