"""Operations that a rank cannot start, as its own arguments are unusable.

It raises at once, and tells the others, which may have started the operation: they get an error. A call that raised
counts as a call: what this rank starts under the same name meets what the others start after theirs has failed.
"""

from __future__ import annotations

from collections import deque

from mpitrain.negotiation.execution import Entry

__all__ = ["Refusals"]


class Refusals:
    """Refused operations of one rank that are undecided, and what waits for their names."""

    def __init__(self) -> None:
        # Of each name, the first is a refusal that has been announced; only the last may be none.
        self._queues: dict[str, deque[Entry]] = {}

    @property
    def are_any(self) -> bool:
        """Whether a refusal is undecided."""
        return bool(self._queues)

    @property
    def keep_waiting(self) -> bool:
        """Whether something is to be announced when a name is free."""
        return any(len(queue) > 1 for queue in self._queues.values())

    def waiting(self) -> list[Entry]:
        """Return the operations that wait for a name."""
        return [entry for queue in self._queues.values() for entry in queue if not entry.announcement.problem]

    def put(self, entry: Entry) -> None:
        """Note a refusal that has been announced."""
        self._queues.setdefault(entry.announcement.name, deque([entry]))

    def put_behind(self, entry: Entry) -> bool:
        """Put an operation behind those of its name; False if there are none, so that it may be announced."""
        queue = self._queues.get(entry.announcement.name)
        if queue is None:
            return False
        queue.append(entry)
        return True

    def decided(self, name: str) -> tuple[bool, Entry | None]:
        """Note the decision about a name: whether it was about a refusal, and what is to be announced now."""
        queue = self._queues.get(name)
        if queue is None:
            return False, None
        queue.popleft()
        following = queue[0] if queue else None
        if following is None or not following.announcement.problem:
            del self._queues[name]
        return True, following

    def clear(self) -> list[Entry]:
        """Forget everything; return what waited for a name."""
        waiting = self.waiting()
        self._queues.clear()
        return waiting
