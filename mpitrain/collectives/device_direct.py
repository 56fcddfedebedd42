"""The direct algorithm on devices: ranks of one node reduce by load and store in each other's device memory.

Every rank reduces its slice over the buffers of all ranks and stores the result into all of them, in one launch. The
host waits for none of that: it queues the work on a stream of its own and says what it has queued.

Two things order the ranks. *Events* order the work: each rank records one when its buffer is filled, and one when its
slice is reduced, and the streams of the others wait for them. *Flags* in the host's memory say that an event has been
recorded, as waiting for one that has not been holds nobody up. A flag is followed by queuing alone, so a rank is never
held up by the work of another one. A rank that dies may leave the streams of others waiting for ever: these are those
of the array (`SharedDeviceArray.streams`), and what is allocated afterwards has others.

Why streams cannot wait for each other in a circle: a stream waits only for events that were recorded before the wait
was queued. Of all work that is not done, what was queued first, on whatever rank, waits for nothing that is not done.

Why an event may be recorded anew: the operation that had it before has ended on this rank, so all others have said that
their slices are reduced, and they do so after they have queued what waits for the first event. For the second one they
have as well said that the next operation's buffers are filled.
"""

from __future__ import annotations

from mpitrain.collectives.direct import FILLED, REDUCED, Across, pipeline, slice_bounds, wait
from mpitrain.collectives.executor import Task
from mpitrain.collectives.node import Node
from mpitrain.collectives.reduction import Reduction
from mpitrain.memory import ReduceOp, SharedDeviceArray, dtype_named
from mpitrain.memory.device import CupyArray, Event, PinnedArray, hand_over, is_done, load_cupy, produced, streams_of
from mpitrain.memory.device.kernels import reduce_peers

__all__ = ["NUM_EVENTS", "DeviceRun", "check_kernels", "device_allreduce", "queue_allreduce"]

# Operations on one block whose events are told apart; more wait for their turn. CUDA allows few events of this kind.
_NUM_SLOTS = 8
NUM_EVENTS = 2 * _NUM_SLOTS
"""Events that a rank needs for each block."""
# How long a piece is on its way across nodes, and how many are at once.
_PIECE_NBYTES = 4 << 20
_NUM_ACROSS = 4


class DeviceRun:
    """What orders one run of a collective with the streams of its caller; one run at a time.

    Args:
        array: What the run works on.
    """

    def __init__(self, array: SharedDeviceArray) -> None:
        self._array = array
        self._begin: Event | None = None
        self._end: Event | None = None

    def enter(self) -> None:
        """Note what the caller has queued, in the caller's thread."""
        self._begin = produced(self._array)

    @property
    def begin(self) -> Event:
        """Is done when what the caller has queued is."""
        assert self._begin is not None
        return self._begin

    def end(self, event: Event) -> None:
        """The run has queued all its work, which is done when `event` is."""
        self._end = event

    def leave(self) -> None:
        """Have what the caller queues from now on come after the run, in the caller's thread."""
        if self._end is not None:
            hand_over(self._array, self._end)


def device_allreduce(
    node: Node, array: SharedDeviceArray, reduction: Reduction, number: int, *, begin: Event, across: Across | None
) -> Task[Event]:
    """Queue the reduction of an array in device memory that the node shares, in place.

    Args:
        node: This rank's node.
        array: Of one length on all nodes.
        reduction: Same on every rank.
        number: Of the call; the same on every rank.
        begin: Is done when the array holds what is to be reduced.
        across: How slices are reduced over the nodes; None where there is only one.

    Returns:
        An event that is done when the array holds the result.

    Cost: each rank reads p slices and writes p, of n/p bytes each, where p is the number of ranks of the node.
    Determinism: reduced in rank order; same bits on all ranks, run after run.
    """
    streams = array.streams
    yield from node.flag_users.turn(number, _NUM_SLOTS)
    streams.compute.wait_event(begin)
    yield from queue_allreduce(node, array, reduction, number + 1, 0, turn=number, across=across)
    return streams.record(streams.compute)


def queue_allreduce(
    node: Node,
    array: SharedDeviceArray,
    reduction: Reduction,
    number: int,
    part: int,
    *,
    turn: int,
    across: Across | None,
) -> Task[None]:
    """Queue the reduction of an array, after what is queued on the stream of kernels and before what will be.

    Args:
        node: As for `device_allreduce`; likewise what is not described.
        array: See there.
        reduction: See there.
        number: For the flags; larger than those of the calls before.
        part: Of the call.
        turn: How many reductions there were on the block before, or more; chooses events.
        across: See there.
    """
    assert array.block is not None
    flags, block, stream = node.flags, array.block, array.streams.compute
    filled = 2 * (turn % _NUM_SLOTS)
    reduced = filled + 1
    block.record(filled, stream)
    flags.signal(FILLED, number, part)
    yield from wait(flags, FILLED, number, part)
    block.wait(filled, stream)
    if across is None:
        begin, end = slice_bounds(array.flat.size, node, node.rank, array.dtype.itemsize, None)
        parts = [flat[begin:end] for flat in array.everybodys]
        _queue_reduction(parts, parts, array, reduction, divides=True)
    else:
        yield from _reduce_across(node, array, reduction, number, across)
    block.record(reduced, stream)
    flags.signal(REDUCED, number, part)
    yield from wait(flags, REDUCED, number, part)
    block.wait(reduced, stream)


def check_kernels(data: CupyArray) -> None:
    """Find out whether kernels can be compiled for a device, on memory there that nobody uses yet.

    Raises:
        UnavailableError: They cannot.
    """
    device = int(data.data.device_id)
    with load_cupy("device").cuda.Device(device):
        stream = streams_of(device).compute
        reduce_peers([data], [data], count=1, dtype=dtype_named("uint8"), op=ReduceOp.SUM, stream=stream)


def _queue_reduction(
    sources: list[CupyArray], targets: list[CupyArray], array: SharedDeviceArray, reduction: Reduction, *, divides: bool
) -> None:
    """Queue one launch that reduces the sources into the targets."""
    count = sources[0].size
    if not count or not targets:
        return
    divisor = reduction.size if divides and reduction.op is ReduceOp.AVERAGE else 1
    stream = array.streams.compute
    with load_cupy("device").cuda.Device(array.device):
        reduce_peers(sources, targets, count=count, dtype=array.dtype, op=reduction.op, divisor=divisor, stream=stream)


def _reduce_across(
    node: Node, array: SharedDeviceArray, reduction: Reduction, number: int, across: Across
) -> Task[None]:
    """Reduce this rank's slice over the ranks of the node, then over the nodes by way of the host, piece by piece."""
    itemsize = array.dtype.itemsize
    piece_count = max(1, _PIECE_NBYTES // itemsize)
    streams = array.streams
    # A slot of pinned memory, and when the device has read it.
    slots = [PinnedArray(array.dtype, (piece_count,)).flat for _ in range(_NUM_ACROSS)]
    emptied: list[Event | None] = [None] * _NUM_ACROSS

    def chain(piece: int) -> Task[None]:
        first, slot = piece * piece_count, piece % _NUM_ACROSS
        length = min(piece_count, array.flat.size - first)
        begin, end = slice_bounds(length, node, node.rank, itemsize, across)
        if begin == end:
            return
        parts = [flat[first + begin : first + end] for flat in array.everybodys]
        mine, host = parts[node.rank], slots[slot][: end - begin]
        _queue_reduction(parts, [mine], array, reduction, divides=False)
        streams.down.wait_event(streams.record(streams.compute))
        if (event := emptied[slot]) is not None:
            streams.down.wait_event(event)
        streams.copy(host, mine, streams.down)
        arrived = streams.record(streams.down)
        while not is_done(arrived):
            yield False
        yield from across.allreduce(host, reduction, number * _NUM_ACROSS + slot)
        reduction.finish(host)
        streams.copy(mine, host, streams.up)
        emptied[slot] = event = streams.record(streams.up)
        streams.compute.wait_event(event)
        others = [part for rank, part in enumerate(parts) if rank != node.rank]
        _queue_reduction([mine], others, array, reduction, divides=False)

    num_pieces = -(-array.flat.size // piece_count)
    yield from pipeline((chain(piece) for piece in range(num_pieces)), _NUM_ACROSS)
    # The slots go back to where others take theirs from.
    while not all(event is None or is_done(event) for event in emptied):
        yield False
