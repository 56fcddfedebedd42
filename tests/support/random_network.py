"""All ranks of a collective in one thread, over a network that is as late and as unordered as MPI permits.

Messages match by source and tag in the order of posting, but everything else is drawn: which rank moves next,
and which matched message arrives next. A send reads its memory when the message arrives, not when it is
posted, so that memory which is overwritten too early is noticed.
"""

from __future__ import annotations

import collections
import dataclasses
import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpitrain.collectives import Task

__all__ = ["RandomNetwork", "run_at_random"]


@dataclasses.dataclass(eq=False)
class _End:
    """One end of a message."""

    buffer: NDArray[np.uint8]
    done: bool = False


class RandomNetwork:
    """The messages of all ranks.

    Args:
        seed: Of all that is drawn.
        eager_nbytes: Sends of up to so many bytes are done at once, as small ones in MPI; -1 is none.
    """

    def __init__(self, seed: int, *, eager_nbytes: int = -1) -> None:
        self.random = random.Random(seed)
        self.eager_nbytes = eager_nbytes
        self.sends: dict[Any, collections.deque[_End]] = collections.defaultdict(collections.deque)
        self.receives: dict[Any, collections.deque[_End]] = collections.defaultdict(collections.deque)
        self.matched: list[tuple[_End, _End]] = []

    def transport(self, rank: int) -> _RandomTransport:
        return _RandomTransport(self, rank)

    def match(self, key: Any) -> None:
        while self.sends[key] and self.receives[key]:
            send, receive = self.sends[key].popleft(), self.receives[key].popleft()
            assert send.buffer.nbytes == receive.buffer.nbytes, f"message {key}: lengths differ"
            self.matched.append((send, receive))

    def deliver_one(self) -> None:
        send, receive = self.matched.pop(self.random.randrange(len(self.matched)))
        receive.buffer[:] = send.buffer
        send.done = receive.done = True


class _RandomTransport:
    """What the executor needs of a transport."""

    def __init__(self, network: RandomNetwork, rank: int) -> None:
        self.network = network
        self.rank = rank

    def isend(self, buffer: NDArray[np.uint8], dest: int, tag: int) -> _End:
        network = self.network
        if buffer.nbytes <= network.eager_nbytes:
            posted, answer = _End(buffer.copy()), _End(buffer, done=True)
        else:
            posted = answer = _End(buffer)
        network.sends[self.rank, dest, tag].append(posted)
        network.match((self.rank, dest, tag))
        return answer

    def irecv(self, buffer: NDArray[np.uint8], source: int, tag: int) -> _End:
        receive = _End(buffer)
        self.network.receives[source, self.rank, tag].append(receive)
        self.network.match((source, self.rank, tag))
        return receive

    def test_some(self, requests: Sequence[_End]) -> list[int]:
        done = [index for index, request in enumerate(requests) if request.done]
        # Any part of what is done may be reported.
        return self.network.random.sample(done, self.network.random.randint(0, len(done)))

    def abandon(self, requests: Sequence[_End]) -> None:
        """Nothing to do: the network ends with the test."""


def run_at_random(network: RandomNetwork, tasks: Sequence[Task[None]], stuck: Callable[[], str] = str) -> None:
    """Run the tasks of all ranks to their ends.

    Raises:
        AssertionError: None of them can move any more.
    """
    running = list(tasks)
    fruitless = 0
    while running:
        if network.matched and network.random.random() < 0.5:
            network.deliver_one()
            fruitless = 0
        task = network.random.choice(running)
        try:
            moved = next(task)
        except StopIteration:
            running.remove(task)
            moved = True
        fruitless = 0 if moved or network.matched else fruitless + 1
        # So many draws without any movement miss a task that could move with a probability of e**-50.
        assert fruitless < 50 * len(tasks) + 50, f"deadlock: {len(running)} of {len(tasks)} ranks wait {stuck()}"
