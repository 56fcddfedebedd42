"""Direct collectives of one exchange: each rank leaves what it brings where the node sees it, then takes what it needs.

That is all-gather, broadcast, reduce and reduce-scatter. Arrays that the node shares are taken from where they lie.
Others are brought to the meeting of the node's ranks if the caller waits and they fit, else they pass through staging
memory in pieces, of which some are under way at the same time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mpitrain.collectives.context import Context
from mpitrain.collectives.direct import NUM_STAGED, Stages, keeping, pipeline, wait
from mpitrain.collectives.executor import Task
from mpitrain.collectives.layout import Layout
from mpitrain.collectives.plan import Call, Plan
from mpitrain.collectives.reduction import Reduction

__all__ = ["Allgather", "Broadcast", "Exchange", "Reduce", "ReduceScatter", "plan_exchange"]

Storage = NDArray[Any]

# Phases of an operation, each with flags of its own.
_FILLED, _TAKEN = 0, 2


class Exchange(Protocol):
    """What one collective brings and takes, in terms of *columns*: elements that all contributions have.

    A piece is a span of columns. What a rank brings of it takes `width` elements for each column.
    """

    num_columns: int
    width: int

    @property
    def data(self) -> Storage:
        """What this rank brings is read from here."""

    @property
    def result(self) -> Storage | None:
        """What it takes is written here; None if it takes nothing."""

    def reads(self, last: int) -> int:
        """How many elements of `data`, from the first on, columns up to `last` need."""

    def writes(self, first: int, last: int) -> Iterable[tuple[int, int]]:
        """First and last elements of `result` that are final once columns `first` to `last` are taken."""

    def bring(self, place: Storage, first: int, last: int) -> None:
        """Leave this rank's part of columns `first` to `last` in `place`, which has room for so many."""

    def take(self, brought: Sequence[Storage], first: int, last: int) -> None:
        """Take columns from what all ranks have brought of them, by rank."""

    def take_shared(self, arrays: Sequence[Storage]) -> None:
        """Take everything from the whole arrays of all ranks."""


class Broadcast:
    """The root's `data` replaces that of all others."""

    width = 1

    def __init__(self, rank: int, root: int, data: Storage) -> None:
        self.num_columns = data.size
        self._is_root = rank == root
        self._root = root
        self.data = self.result = data

    def reads(self, last: int) -> int:
        return last

    def writes(self, first: int, last: int) -> Iterable[tuple[int, int]]:
        return [(first, last)]

    def bring(self, place: Storage, first: int, last: int) -> None:
        if self._is_root:
            place[:] = self.data[first:last]

    def take(self, brought: Sequence[Storage], first: int, last: int) -> None:
        if not self._is_root:
            self.data[first:last] = brought[self._root]

    def take_shared(self, arrays: Sequence[Storage]) -> None:
        self.take(arrays, 0, self.num_columns)


class Allgather:
    """Each rank's `data` goes to its place in the `result` of all."""

    width = 1

    def __init__(self, rank: int, data: Storage, result: Storage, layout: Layout) -> None:
        self.num_columns = max(layout.counts)
        self._rank = rank
        self.data = data
        self.result = result
        self._layout = layout

    def reads(self, last: int) -> int:
        return min(last, self.data.size)

    def writes(self, first: int, last: int) -> Iterable[tuple[int, int]]:
        parts = zip(self._layout.offsets, self._layout.counts, strict=True)
        return [(offset + first, offset + min(last, count)) for offset, count in parts if first < count]

    def bring(self, place: Storage, first: int, last: int) -> None:
        part = self.data[first:last]
        place[: part.size] = part

    def take(self, brought: Sequence[Storage], first: int, last: int) -> None:
        for rank, (offset, count) in enumerate(zip(self._layout.offsets, self._layout.counts, strict=True)):
            part = self.result[offset + first : offset + min(last, count)] if first < count else self.result[:0]
            part[:] = self.data[first:last] if rank == self._rank else brought[rank][: part.size]

    def take_shared(self, arrays: Sequence[Storage]) -> None:
        self.take(arrays, 0, self.num_columns)


class Reduce:
    """The root reduces the `data` of all into `result`, which only it has."""

    width = 1

    def __init__(self, rank: int, data: Storage, result: Storage | None, reduction: Reduction) -> None:
        self.num_columns = data.size
        self._rank = rank
        self.data = data
        self.result = result
        self._reduction = reduction

    def reads(self, last: int) -> int:
        return last

    def writes(self, first: int, last: int) -> Iterable[tuple[int, int]]:
        return [(first, last)]

    def bring(self, place: Storage, first: int, last: int) -> None:
        if self.result is None:
            place[:] = self.data[first:last]

    def take(self, brought: Sequence[Storage], first: int, last: int) -> None:
        if self.result is not None:
            own = self.data[first:last]
            total = self.result[first:last]
            self._reduction.combine([own if rank == self._rank else part for rank, part in enumerate(brought)], total)
            self._reduction.finish(total)

    def take_shared(self, arrays: Sequence[Storage]) -> None:
        self.take(arrays, 0, self.num_columns)


class ReduceScatter:
    """Each rank reduces its part of the `data` of all into its `result`."""

    def __init__(self, rank: int, data: Storage, result: Storage, layout: Layout, reduction: Reduction) -> None:
        self.num_columns = max(layout.counts)
        self.width = len(layout.counts)
        self._rank = rank
        self.data = data
        self.result = result
        self._layout = layout
        self._reduction = reduction

    def reads(self, last: int) -> int:
        # The last rank's part is read as soon as that of the first one.
        return self.data.size - max(0, self._layout.counts[-1] - last)

    def writes(self, first: int, last: int) -> Iterable[tuple[int, int]]:
        return [(min(first, self.result.size), min(last, self.result.size))]

    def bring(self, place: Storage, first: int, last: int) -> None:
        span = last - first
        for owner in range(self.width):
            if owner != self._rank:
                part = self._part(self.data, owner, first, last)
                place[owner * span : owner * span + part.size] = part

    def take(self, brought: Sequence[Storage], first: int, last: int) -> None:
        own = self._part(self.data, self._rank, first, last)
        begin = self._rank * (last - first)
        others = [place[begin : begin + own.size] for place in brought]
        self._combine([own if rank == self._rank else part for rank, part in enumerate(others)], first)

    def take_shared(self, arrays: Sequence[Storage]) -> None:
        self._combine([self._part(array, self._rank, 0, self.num_columns) for array in arrays], 0)

    def _part(self, data: Storage, owner: int, first: int, last: int) -> Storage:
        offset, count = self._layout.offsets[owner], self._layout.counts[owner]
        return data[offset + min(first, count) : offset + min(last, count)]

    def _combine(self, parts: list[Storage], first: int) -> None:
        total = self.result[first : first + parts[0].size]
        self._reduction.combine(parts, total)
        self._reduction.finish(total)


def plan_exchange(
    context: Context,
    exchange: Exchange,
    array: Any,
    *,
    storage: np.dtype[Any],
    description: str,
    result: Callable[[], Any],
    blocking: bool,
) -> Plan[Any]:
    """Prepare an exchange among the ranks of one node, which are all ranks.

    Args:
        context: Of the communicator.
        exchange: What is brought and taken; the same kind and sizes on every rank.
        array: The caller's; a `SharedArray` of these ranks is taken from where it lies.
        storage: What is brought is made of.
        description: Of the operation.
        result: Returns what the plan's runs return.
        blocking: Whether the plan is made to be waited for at once; same on every rank.

    Cost: what is brought is copied once, unless it is shared; what is taken is read once.
    Determinism: reduced in rank order.
    """
    node, meeting = context.node, context.meeting
    assert node is not None
    assert meeting is not None
    brought_count = exchange.num_columns * exchange.width
    nbytes = brought_count * storage.itemsize
    if context.shares(array):

        def from_shared(call: Call) -> Task[Any]:
            node.flags.signal(_FILLED, call.number + 1)
            yield from wait(node.flags, _FILLED, call.number + 1)
            exchange.take_shared(array.everybodys)
            with keeping(node.flags, _TAKEN, call.number + 1):
                yield from wait(node.flags, _TAKEN, call.number + 1)
            return result()

        return Plan(f"{description} in shared memory", from_shared, uses_flags=True, nbytes=nbytes)
    if blocking and nbytes <= meeting.slot_nbytes:
        slots = meeting.parts(storage, brought_count)

        def at_meeting(_call: Call) -> Task[Any]:
            yield from ()  # all have come, so there is nothing to wait for
            exchange.take(slots[meeting.slot], 0, exchange.num_columns)
            return result()

        def bring() -> None:
            exchange.bring(slots[meeting.next_slot][meeting.rank], 0, exchange.num_columns)

        return Plan(description, at_meeting, nbytes=nbytes, bring=bring)

    def staged(call: Call) -> Task[Any]:
        while not context.staging_order.may_start(call.staging_ticket):
            yield False
        made = result()
        if call.gates is not None and made is not None and call.gates.of(exchange.result) is None:
            call.gates.add(made)
        yield from _staged(context, exchange, storage, call)
        return made

    return Plan(
        f"{description} through staging memory",
        staged,
        uses_staging=True,
        uses_flags=True,
        nbytes=nbytes,
        is_gated=True,
    )


def _staged(context: Context, exchange: Exchange, storage: np.dtype[Any], call: Call) -> Task[None]:
    """Return the task that passes all columns through staging memory, which no other operation uses meanwhile."""
    node, number = context.node, call.number + 1
    assert node is not None
    read_gate = None if call.gates is None else call.gates.of(exchange.data)
    write_gate = None if call.gates is None else call.gates.of(exchange.result)
    flags = node.flags
    staging = node.staging(storage)
    slot_count = staging[0].size // NUM_STAGED
    columns = max(1, slot_count // exchange.width)
    num_pieces = -(-exchange.num_columns // columns)
    stages = Stages(flags, number)
    previous = node.last_staged
    if num_pieces:
        node.last_staged = (number, num_pieces - 1)

    def chain(piece: int) -> Task[None]:
        first = piece * columns
        last = min(first + columns, exchange.num_columns)
        begin = piece % NUM_STAGED * slot_count
        places = [memory[begin : begin + (last - first) * exchange.width] for memory in staging]
        if piece >= NUM_STAGED:
            yield from stages.left_by_all(_TAKEN, piece - NUM_STAGED)
        else:
            yield from wait(flags, _TAKEN, *previous)
        if read_gate is not None:
            yield from read_gate.until(exchange.reads(last))
        exchange.bring(places[node.rank], first, last)
        yield from stages.leave(_FILLED, piece)
        yield from stages.left_by_all(_FILLED, piece)
        exchange.take(places, first, last)
        if write_gate is not None:
            for begin, end in exchange.writes(first, last):
                write_gate.give(begin, end)
        yield from stages.leave(_TAKEN, piece)

    yield from pipeline((chain(piece) for piece in range(num_pieces)), NUM_STAGED)
