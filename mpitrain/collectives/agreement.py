"""Do all ranks mean the same collective? Asked before it starts, so that a mismatch is an error and never a hang.

Each rank describes what it brings. The ranks compare a digest of the descriptions (in shared memory if they are on
one node and block), and only if these differ do they exchange the descriptions themselves, so all know who differs.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from mpitrain.collectives.context import Context
from mpitrain.collectives.executor import Task
from mpitrain.collectives.layout import Layout
from mpitrain.collectives.plan import STRAIGHT, THROUGH_DEVICES, Call
from mpitrain.comm import Transport
from mpitrain.config import PREFIX, Settings
from mpitrain.errors import CollectiveMismatchError
from mpitrain.memory import ReduceOp, dtype_named

__all__ = [
    "FALL_BACK",
    "agree",
    "check_same_settings",
    "digest_of",
    "exchange_rows",
    "explain",
    "read_settings",
]

_INT64 = dtype_named("int64")
_UINT8 = dtype_named("uint8")
_DESCRIPTION_NBYTES = 512
_MEANING_NBYTES = 7
_WAYS = (STRAIGHT, THROUGH_DEVICES)

FALL_BACK = "some ranks' arrays stay on devices, those of others do not"
"""What ranks agree on that mean the same collective and bring arrays of different memory."""


def agree(
    context: Context,
    description: str,
    call: Call,
    bring: Callable[[], None] | None = None,
    *,
    keep_turn: bool = False,
) -> Task[str]:
    """Return the task that compares `description`, and the form of the call, over all ranks.

    Args:
        context: Of the communicator.
        description: Of the operation.
        call: Of the operation.
        bring: See `Plan`.
        keep_turn: Whether the operation itself is a collective of the MPI library.

    Returns:
        The same on every rank: nothing if they agree, `FALL_BACK`, or a message with a line for each description.

    Raises:
        CollectiveMismatchError: Another rank has called another form, where the ranks meet in shared memory.
    """
    if not call.blocking:
        description += ", asynchronous"
    task = _agree(context, description, call, bring, keep_turn=keep_turn)
    return task if call.trace is None else call.trace.hold("agreement", task)


def _agree(
    context: Context, description: str, call: Call, bring: Callable[[], None] | None, *, keep_turn: bool
) -> Task[str]:
    digest = digest_of(description)
    if context.meeting is not None and call.blocking:
        meeting = context.meeting
        if bring is not None:
            bring()
        meeting.arrive(digest)
        yield from meeting.wait()
        return "" if meeting.agrees() else (yield from explain(context, description, call))
    # One minimum finds both ends: the ranks agree if the smallest is also the largest.
    ends = np.array([digest, -digest], np.int64)
    if call.ticket >= 0 and context.meeting is None:
        # Not a blocking call: only who looks up now and then learns that a rank will not come. Once all agree all
        # are there, and the collective itself, which keeps this one's turn, may block.
        native, waited_for = context.transport.native.allreduce, call._replace(blocking=False)
        yield from context.run_native(waited_for, native, ends, _INT64, ReduceOp.MIN, keep_turn=keep_turn)
    else:
        program = context.program("allreduce", "recursive_doubling", Layout.packed((2,)), _INT64, nbytes=16)
        yield from context.execute(program, [ends], _INT64, call, ReduceOp.MIN)
    return "" if ends[0] == -ends[1] else (yield from explain(context, description, call))


@functools.lru_cache(maxsize=4096)
def digest_of(description: str) -> int:
    """Return a number of 56 bits that tells descriptions apart."""
    return int.from_bytes(hashlib.blake2b(description.encode(), digest_size=7).digest(), "little")


def explain(context: Context, description: str, call: Call) -> Task[str]:
    """Return the task that tells all ranks who brings what; when they are known to disagree."""
    return _message((yield from _exchange(context, description, call)))


def check_same_settings(transport: Transport, settings: Settings) -> None:
    """Refuse settings that differ between ranks, as they decide how messages are cut. Every rank must call.

    Raises:
        CollectiveMismatchError: The message names what differs; raised on every rank.
    """
    answers = [dataclasses.asdict(each) for each in transport.gather_everywhere(settings)]
    for name, first in answers[0].items():
        odd = [rank for rank, answer in enumerate(answers) if answer[name] != first]
        if odd:
            raise CollectiveMismatchError(
                f"{PREFIX}{name.upper()}: must be the same on every rank, got {answers[odd[0]][name]!r} on ranks "
                f"{_ranges(odd)} and {first!r} on rank 0; have mpirun hand the environment to all hosts"
            )


def read_settings(transport: Transport, settings: Settings | None) -> Settings:
    """Return the settings, read from the environment if none are given. Every rank must call.

    Raises:
        ValueError: A variable with an unusable value, on the rank that has it.
        CollectiveMismatchError: Another rank has one.
    """
    try:
        settings = settings or Settings.from_environ()
    except ValueError as error:
        transport.gather_everywhere(str(error))
        raise
    for rank, problem in enumerate(transport.gather_everywhere("")):
        if problem:
            raise CollectiveMismatchError(f"settings: the environment of rank {rank} is unusable: {problem}")
    return settings


class _Brought(NamedTuple):
    """What one rank says.

    Attributes:
        meaning: Digest of what the caller asked for; ranks agree on the algorithm later.
        way: Which way its device memory goes, if not by that of the host; an index of `_WAYS`.
        text: The description, or its beginning.
    """

    meaning: bytes
    way: int
    text: str

    @classmethod
    def of(cls, description: str) -> _Brought:
        """Return what says a description."""
        meaning = digest_of(description.partition(" by ")[0]).to_bytes(_MEANING_NBYTES, "little")
        way = next((way for way, said in enumerate(_WAYS) if said in description), len(_WAYS))
        return cls(meaning, way, description)

    def to_bytes(self) -> bytes:
        return self.meaning + bytes([self.way]) + self.text.encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> _Brought:
        meaning, rest = data[:_MEANING_NBYTES], data[_MEANING_NBYTES:]
        return cls(meaning, rest[0], rest[1:].rstrip(b"\0").decode(errors="replace"))


def _exchange(context: Context, description: str, call: Call) -> Task[list[_Brought]]:
    data = _Brought.of(description).to_bytes()[:_DESCRIPTION_NBYTES]
    rows = yield from exchange_rows(context, data, _DESCRIPTION_NBYTES, call)
    return [_Brought.from_bytes(row) for row in rows]


def exchange_rows(context: Context, row: bytes, row_nbytes: int, call: Call) -> Task[list[bytes]]:
    """Collect bytes of each rank on every rank, by rank, each followed by zeros up to `row_nbytes`."""
    table = np.zeros((context.size, row_nbytes), np.uint8)
    table[context.rank, : len(row)] = np.frombuffer(row, np.uint8)
    layout = Layout.packed((row_nbytes,) * context.size)
    program = context.program("allgather", "ring", layout, _UINT8, nbytes=table.nbytes)
    yield from context.execute(program, [table.reshape(-1)], _UINT8, call)
    return [each.tobytes() for each in table]


def _message(everything: list[_Brought]) -> str:
    if len({each.way for each in everything}) > 1 and len({each.meaning for each in everything}) == 1:
        return FALL_BACK
    by_description: dict[str, list[int]] = {}
    for rank, each in enumerate(everything):
        by_description.setdefault(each.text, []).append(rank)
    lines = [f"  ranks {_ranges(ranks)}: {description}" for description, ranks in by_description.items()]
    return "\n".join(["collective: ranks bring different things; call the same on every rank", *lines])


def _ranges(ranks: list[int]) -> str:
    """Write ascending ranks as "0-2, 5"."""
    parts: list[str] = []
    begin = previous = ranks[0]
    for rank in [*ranks[1:], None]:
        if rank is not None and rank == previous + 1:
            previous = rank
            continue
        parts.append(str(begin) if begin == previous else f"{begin}-{previous}")
        if rank is not None:
            begin = previous = rank
    return ", ".join(parts)
