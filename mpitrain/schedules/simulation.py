"""All ranks of a schedule, run at once over symbolic contents.

Terms: a *channel* is a pair (source, dest); messages of a channel match in order. A rank
*posts* a round, which takes copies of what it sends, and *completes* it when all its
messages are matched, which puts what it received in place.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from mpitrain.schedules.algorithm import Algorithm
from mpitrain.schedules.contents import UNDEFINED, is_reducing
from mpitrain.schedules.proof_error import ProofError
from mpitrain.schedules.round_rules import check_round
from mpitrain.schedules.rounds import Receive, Round, Send
from mpitrain.schedules.waiting import Waiting, explain_waiting

__all__ = ["Simulation"]


class _PostedSend(NamedTuple):
    message: Send
    round_index: int
    contents: list[int]


class _PostedReceive(NamedTuple):
    message: Receive
    round_index: int
    slot: int  # where the contents go in the arrivals of the receiver


class Simulation:
    """The state of all ranks.

    Attributes:
        algorithm: Whose conventions on chunks hold.
        size: The number of ranks.
        contents: The contents of the chunks of each rank.
        chunks_sent: How many chunks each rank has sent.
        messages_sent: How many messages each rank has sent.
    """

    def __init__(
        self,
        algorithm: Algorithm,
        rounds: Sequence[Iterator[Round]],
        contents: list[list[int]],
    ) -> None:
        """Put every rank before its first round."""
        self.algorithm = algorithm
        self.size = len(rounds)
        self.contents = contents
        self.chunks_sent = [0] * self.size
        self.messages_sent = [0] * self.size
        self._num_chunks = 0 if algorithm.collective == "barrier" else len(contents[0])
        self._is_signal_only = algorithm.collective == "barrier"
        self._may_reduce = is_reducing(algorithm.collective)
        self._rounds = rounds
        self._round_index = [-1] * self.size
        self._is_done = [False] * self.size
        self._num_unmatched = [0] * self.size
        self._receives: list[tuple[Receive, ...]] = [()] * self.size
        self._arrivals: list[list[list[int]]] = [[] for _ in range(self.size)]
        self._posted_sends: dict[tuple[int, int], deque[_PostedSend]] = defaultdict(deque)
        self._posted_receives: dict[tuple[int, int], deque[_PostedReceive]] = defaultdict(deque)

    def run(self) -> None:
        """Run until every rank is done.

        Raises:
            ProofError: A message is wrong, or some ranks wait for ever.
        """
        movable = list(range(self.size))
        while movable:
            self._advance(movable.pop(), movable)
        if not all(self._is_done):
            raise ProofError(explain_waiting(self._unmatched(), self._is_done))

    def num_rounds(self) -> int:
        """Return the number of rounds, which must be the same on all ranks."""
        # A rank that is done stands one past its last round.
        for rank, num_rounds in enumerate(self._round_index):
            if num_rounds != self._round_index[0]:
                raise ProofError(
                    f"rank {rank}: ranks differ in their number of rounds, got {num_rounds}; "
                    f"rank 0 has {self._round_index[0]}"
                )
        return self._round_index[0]

    def _advance(self, rank: int, movable: list[int]) -> None:
        """Take `rank` through its rounds until it must wait; add peers this sets free."""
        if self._num_unmatched[rank] or self._is_done[rank]:
            return
        self._complete(rank)
        for current in self._rounds[rank]:
            self._round_index[rank] += 1
            if not current.sends and not current.receives:
                continue
            check_round(current, rank, self._round_index[rank], self.size, self._num_chunks)
            self._post(rank, current, movable)
            if self._num_unmatched[rank]:
                return
            self._complete(rank)
        self._round_index[rank] += 1
        self._is_done[rank] = True

    def _post(self, rank: int, current: Round, movable: list[int]) -> None:
        round_index = self._round_index[rank]
        self._receives[rank] = current.receives
        self._arrivals[rank] = [[] for _ in current.receives]
        self._num_unmatched[rank] = len(current.sends) + len(current.receives)
        self.messages_sent[rank] += len(current.sends)
        contents = self.contents[rank]
        for send in current.sends:
            copied = contents[:] if self._is_signal_only else contents[send.start : send.stop]
            if UNDEFINED in copied:
                chunk = send.start + copied.index(UNDEFINED)
                raise ProofError(
                    f"rank {rank}, round {round_index}, peer {send.peer}, chunk {chunk}: an undefined chunk is sent"
                )
            self.chunks_sent[rank] += send.stop - send.start
            channel = (rank, send.peer)
            posted = _PostedSend(send, round_index, copied)
            if waiting := self._posted_receives.get(channel):
                self._match(channel, posted, waiting.popleft(), movable)
            else:
                self._posted_sends[channel].append(posted)
        for slot, receive in enumerate(current.receives):
            channel = (receive.peer, rank)
            posted_receive = _PostedReceive(receive, round_index, slot)
            if sent := self._posted_sends.get(channel):
                self._match(channel, sent.popleft(), posted_receive, movable)
            else:
                self._posted_receives[channel].append(posted_receive)

    def _match(
        self,
        channel: tuple[int, int],
        send: _PostedSend,
        receive: _PostedReceive,
        movable: list[int],
    ) -> None:
        source, dest = channel
        _, start, stop = send.message
        if send.round_index != receive.round_index:
            raise ProofError(
                f"rank {source}, round {send.round_index}, peer {dest}: chunks [{start}:{stop}] "
                f"are received in another round, got {receive.round_index}"
            )
        sent, received = (start, stop), (receive.message.start, receive.message.stop)
        is_same = stop - start == received[1] - received[0]
        if not (is_same if self.algorithm.renumbers_chunks else sent == received):
            raise ProofError(
                f"rank {source}, round {send.round_index}, peer {dest}: chunks [{start}:{stop}] "
                f"are sent, got [{received[0]}:{received[1]}] on the receiver"
            )
        self._arrivals[dest][receive.slot] = send.contents
        for rank in channel:
            self._num_unmatched[rank] -= 1
            if self._num_unmatched[rank] == 0:
                movable.append(rank)

    def _complete(self, rank: int) -> None:
        contents = self.contents[rank]
        for receive, arrived in zip(self._receives[rank], self._arrivals[rank], strict=True):
            if self._is_signal_only:
                contents[0] |= arrived[0]
            elif receive.reduce:
                self._reduce(rank, receive, arrived)
            else:
                contents[receive.start : receive.stop] = arrived
        self._receives[rank] = ()
        self._arrivals[rank] = []

    def _reduce(self, rank: int, receive: Receive, arrived: list[int]) -> None:
        contents = self.contents[rank]
        where = f"rank {rank}, round {self._round_index[rank]}, peer {receive.peer}"
        if not self._may_reduce:
            raise ProofError(f"{where}: {self.algorithm.collective} has nothing to reduce")
        for chunk, content in enumerate(arrived, receive.start):
            local = contents[chunk]
            if UNDEFINED in (content, local):
                raise ProofError(f"{where}, chunk {chunk}: an undefined chunk is reduced")
            if content & local:
                raise ProofError(
                    f"{where}, chunk {chunk}: contributions count twice, got {content:#x} to reduce into {local:#x}"
                )
            contents[chunk] = content | local

    def _unmatched(self) -> Iterator[Waiting]:
        for (source, dest), sends in self._posted_sends.items():
            for message, round_index, _ in sends:
                what = f"chunks [{message.start}:{message.stop}] are not received"
                yield Waiting(source, dest, round_index, what)
        for (source, dest), receives in self._posted_receives.items():
            for received, round_index, _ in receives:
                what = f"chunks [{received.start}:{received.stop}] are not sent"
                yield Waiting(dest, source, round_index, what)
