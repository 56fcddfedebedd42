"""Ranks that are threads of one process: the whole toolkit without an MPI launcher, for tests.

results = run_ranks(4, lambda transport: transport.rank ** 2)
"""

from __future__ import annotations

import collections
import dataclasses
import threading
import time
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import numpy as np

from mpitrain.comm.base import Bytes, Transport
from mpitrain.errors import CollectiveMismatchError, CommError, CommTimeoutError
from mpitrain.memory import SharedBlock

__all__ = ["ThreadTransport", "ThreadWorld", "run_ranks"]

Result = TypeVar("Result")

# Time for the other ranks to end by themselves after one has failed.
_PATIENCE_S = 5.0


@dataclasses.dataclass(slots=True, eq=False)
class _Message:
    buffer: Bytes
    done: bool = False
    error: CommError | CollectiveMismatchError | None = None


class ThreadWorld:
    """What the ranks of one in-process job share: messages, notices and values put together.

    Args:
        size: Number of ranks.
        ranks_per_node: Pretend that ranks are placed on nodes of so many; None is one node.
        rendezvous: A send is done only when its receive has been posted, as with large
            messages in MPI; otherwise a send is done at once, as with small ones.
    """

    def __init__(self, size: int, *, ranks_per_node: int | None = None, rendezvous: bool = False) -> None:
        self.size = size
        self.ranks_per_node = ranks_per_node or size
        self.rendezvous = rendezvous
        self.changed = threading.Condition()
        self.closed = False
        self.receives: dict[Hashable, collections.deque[_Message]] = collections.defaultdict(collections.deque)
        self.sends: dict[Hashable, collections.deque[_Message]] = collections.defaultdict(collections.deque)
        self.notices: dict[Hashable, collections.deque[tuple[int, bytes]]] = collections.defaultdict(collections.deque)
        self.values: dict[Hashable, dict[int, Any]] = collections.defaultdict(dict)
        self.taken: dict[Hashable, int] = {}

    def close(self) -> None:
        """Wake up everybody who still waits, with an error."""
        with self.changed:
            self.closed = True
            self.changed.notify_all()


class ThreadTransport(Transport):
    """One rank's end of a `ThreadWorld`."""

    max_tag = 2**31 - 1

    def __init__(self, world: ThreadWorld, members: tuple[int, ...], rank: int, context: Hashable = "world") -> None:
        self.world = world
        self.members = members
        self.rank = rank
        self.size = len(members)
        self._context = context
        self._calls = 0

    def isend(self, buffer: Bytes, dest: int, tag: int) -> _Message:
        world = self.world
        key = (self._context, self.rank, dest, tag)
        with world.changed:
            if receive := _take(world.receives, key):
                _deliver(buffer, receive)
                return _Message(buffer, done=True)
            message = _Message(buffer if world.rendezvous else buffer.copy())
            world.sends[key].append(message)
            return message if world.rendezvous else _Message(buffer, done=True)

    def irecv(self, buffer: Bytes, source: int, tag: int) -> _Message:
        world = self.world
        key = (self._context, source, self.rank, tag)
        with world.changed:
            receive = _Message(buffer)
            if message := _take(world.sends, key):
                _deliver(message.buffer, receive)
                message.done = True
            else:
                world.receives[key].append(receive)
            return receive

    def test_some(self, requests: list[_Message]) -> list[int]:
        done = [index for index, request in enumerate(requests) if request.done]
        for index in done:
            error = requests[index].error
            if error is not None:
                raise error
        if not done and self.world.closed:
            raise CommError(f"rank {self.rank}/{self.size}: the in-process job has ended; a message is missing")
        return done

    def abandon(self, requests: list[_Message]) -> None:
        with self.world.changed:
            for queues in (self.world.receives, self.world.sends):
                for key, queue in list(queues.items()):
                    kept = collections.deque(each for each in queue if each not in requests)
                    if kept:
                        queues[key] = kept
                    else:
                        del queues[key]

    def notify(self, dest: int, notice: bytes) -> None:
        with self.world.changed:
            self.world.notices[self._context, dest].append((self.rank, notice))

    def notices(self) -> list[tuple[int, bytes]]:
        key = (self._context, self.rank)
        if not self.world.notices.get(key):
            return []
        with self.world.changed:
            arrived = list(self.world.notices[key])
            self.world.notices[key].clear()
            return arrived

    def gather_everywhere(self, value: Any) -> list[Any]:
        world = self.world
        key = (self._context, self._calls)
        self._calls += 1
        with world.changed:
            values = world.values[key]
            values[self.rank] = value
            world.changed.notify_all()
            world.changed.wait_for(lambda: len(values) == self.size or world.closed)
            if len(values) < self.size:
                raise CommError(f"rank {self.rank}/{self.size}: the in-process job has ended; a rank is missing")
            answer = [values[rank] for rank in range(self.size)]
            # Taken by all: the last one clears up.
            taken = world.taken[key] = world.taken.get(key, 0) + 1
            if taken == self.size:
                del world.values[key], world.taken[key]
            return answer

    def allocate_shared(self, nbytes: int) -> SharedBlock:
        views = self.gather_everywhere(np.zeros(nbytes, np.uint8))
        return SharedBlock(views, fence=None)

    def node_leader(self) -> int:
        node = self.members[self.rank] // self.world.ranks_per_node
        return next(rank for rank, member in enumerate(self.members) if member // self.world.ranks_per_node == node)

    def split(self, color: int | None, key: int) -> ThreadTransport | None:
        call = self._calls
        answers = self.gather_everywhere((color, key))
        if color is None:
            return None
        ranks = [
            rank
            for _, rank in sorted((answers[rank][1], rank) for rank in range(self.size) if answers[rank][0] == color)
        ]
        members = tuple(self.members[rank] for rank in ranks)
        return ThreadTransport(self.world, members, ranks.index(self.rank), (self._context, call, color))

    def abort(self) -> None:
        """End the waiting of all ranks."""
        self.world.close()

    def free(self) -> None:
        """Nothing to release: the world's memory goes with the world."""


def _take(queues: dict[Hashable, collections.deque[_Message]], key: Hashable) -> _Message | None:
    queue = queues.get(key)
    if queue is None:
        return None
    message = queue.popleft()
    if not queue:
        # Tags go up with every operation, so empty queues would pile up.
        del queues[key]
    return message


def _deliver(data: Bytes, receive: _Message) -> None:
    if data.nbytes != receive.buffer.nbytes:
        receive.error = CollectiveMismatchError(
            f"message: length differs from what the receiver expects, got {data.nbytes} bytes "
            f"for {receive.buffer.nbytes}; all ranks must bring the same count and dtype"
        )
    else:
        receive.buffer[:] = data
    receive.done = True


def run_ranks(
    size: int,
    function: Callable[[ThreadTransport], Result],
    *,
    ranks_per_node: int | None = None,
    rendezvous: bool = False,
    timeout_s: float = 200.0,
) -> list[Result]:
    """Call `function(transport)` on `size` ranks, each a thread, and return their results by rank.

    Raises:
        CommTimeoutError: A rank did not return in `timeout_s` seconds.
        BaseException: What the first failing rank raised.
    """
    world = ThreadWorld(size, ranks_per_node=ranks_per_node, rendezvous=rendezvous)
    results: list[Any] = [None] * size
    failures: list[tuple[int, BaseException]] = []
    unfinished = set(range(size))
    ended = threading.Semaphore(0)

    def run(rank: int) -> None:
        try:
            results[rank] = function(ThreadTransport(world, tuple(range(size)), rank))
        except BaseException as error:  # noqa: BLE001  (raised again by the caller)
            failures.append((rank, error))
        finally:
            unfinished.discard(rank)
            ended.release()

    threads = [threading.Thread(target=run, args=(rank,), name=f"rank {rank}", daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    deadline_s = time.monotonic() + timeout_s
    has_failed = False
    for _ in threads:
        ended.acquire(timeout=max(0.0, deadline_s - time.monotonic()))
        if failures and not has_failed:
            # Others may wait for the failed rank: let them notice by themselves, then end them.
            has_failed = True
            deadline_s = min(deadline_s, time.monotonic() + _PATIENCE_S)
    late = sorted(unfinished)
    world.close()
    if failures:
        raise failures[0][1]
    if late:
        raise CommTimeoutError(f"in-process ranks {late}: no result after {timeout_s:g} s, expected all {size}")
    return results
