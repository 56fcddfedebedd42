"""Which algorithm is the fastest where nothing was measured: the cheapest by the prices of a typical machine.

Schedules are priced on a `Network`. What is no schedule has a formula of the same constants: the MPI library's own
collectives, and the all-reduce in shared memory. Prices are made of what all ranks share, and of sums, products and
quotients only, so every rank comes to the same result.

The constants of one node were measured by `mpitrain tune --times` on 2 ranks of a virtual machine with 2 cores (Xeon
with AVX-512, Open MPI 5.0.11, Python 3.11), float32 sums in place, medians in microseconds:

    bytes    native   recursive_doubling   ring   direct   direct in shared memory
    8            10                   40     55       36                        22
    32 KiB       25                   69     74       42                        23
    256 KiB      59                  144    121       69                        29
    2 MiB       352                  519    464      415                       151
    32 MiB    10500                 7053   5025     6230                      2214

    the same in the background
    8           123                  143    148      139                       153
    2 MiB      2112                  794    765      797                       402

There direct passes ordinary arrays through staging memory. Where the ranks read them instead, from 2 MiB on, it is as
fast as native at about 8 MiB, and twice as fast from 32 MiB on.

The constants between nodes are of a cluster with 10 Gbit/s links. What is compared is their ratio, which differs less
between machines than they do themselves. It was measured on emulated hosts with 1 Gbit/s in each direction, 64 MiB, in
multiples of the bandwidth's bound: 4 hosts, ring 1.07, halving and doubling 1.47, double tree 1.74, Open MPI's own 1.21
(2.13 as it is installed) and MPICH's 1.11; 2 hosts with 2 ranks each, hierarchical 1.07 and Open MPI's own 1.09.
"""

from __future__ import annotations

import functools

from mpitrain.collectives.selection import DIRECT, HIERARCHICAL, LEAST_READ_NBYTES, NATIVE, choose_num_segments
from mpitrain.collectives.table import Shape
from mpitrain.schedules import ALGORITHMS, Algorithm, Network, price

__all__ = ["predict_algorithm", "predicted_s"]

# One call: the Python that prepares and starts it.
_SCHEDULE_CALL_S = 30e-6
_NATIVE_CALL_S = 8e-6
_STAGED_CALL_S = 35e-6
_WINDOW_CALL_S = 24e-6
_READ_CALL_S = 150e-6
_MEETING_CALL_S = 2.5e-6
_PLAN_CALL_S = 9e-6
_MET_RANK_S = 0.1e-6
# The ranks wait for each other's pieces.
_STAGED_PIECE_S = 10e-6
_STAGED_PIECE_NBYTES = 1 << 20
# What is brought to the meeting of the node's ranks, with the default settings.
_BROUGHT_NBYTES = 1 << 20
_READ_WHOLE_NBYTES = 64 << 10

# One round of a schedule, or one level of the tree that an MPI library builds.
_ROUND_S = 20e-6
_CROSS_ROUND_S = 60e-6
_NATIVE_LEVEL_S = 2e-6
_NATIVE_CROSS_LEVEL_S = 20e-6

_BYTES_PER_S = 8e9
_REDUCED_BYTES_PER_S = 10e9
_CROSS_BYTES_PER_S = 1.25e9
# Per byte of the array: in shared memory all is read and written once. Else it is also copied there and back, in pieces
# that stay in the caches.
_WINDOW_BYTES_PER_S = 16e9
_STAGED_BYTES_PER_S = 14e9
_COPIED_BYTES_PER_S = 9e9
_PASSED_BYTES_PER_S = 11e9
# What the ranks read of each other's ordinary arrays. It is as fast as the library's own at about 8 MiB.
_READ_BYTES_PER_S = 7.6e9
# How many times longer than the best schedule's a byte takes in an MPI library: in a node; there where its temporary
# buffers are fresh pages in each call, as the C library returns those of 32 MiB and more to the system; between nodes,
# where it was 1.1 to 2.1; and without a caller who waits, where it was 1.9 to 3.4 from 256 KiB.
_NATIVE_LARGE_NBYTES = 28 << 20
_NATIVE_LARGE_FACTOR = 2.0
_NATIVE_FACTOR = 0.85
_NATIVE_CROSS_FACTOR = 1.4
_NATIVE_BACKGROUND_FACTOR = 2.5
# How many times longer between nodes where peers change from round to round, as links are idle in between. Where they
# stay the same, the next round's bytes are on their way before this one's have arrived.
_CHANGING_PEERS_FACTOR = 1.35
_SAME_PEERS = ("ring", "chain")

# Rounds times ranks up to which a schedule is walked, which takes some microseconds for each.
_MOST_WALKED = 128
# Prices that differ by less are the same.
_ROUNDING = 1e-6
# Here one rank of a node at a time has a peer on another node, while elsewhere all of them have.
_ONE_CROSSES = ("ring", "chain", "binomial")


@functools.lru_cache(maxsize=4096)
def predict_algorithm(
    collective: str,
    nbytes: int,
    shape: Shape,
    candidates: tuple[str, ...],
    *,
    segment_nbytes: int,
    blocking: bool = True,
    in_window: bool = False,
    reads_memory: bool = False,
) -> str:
    """Return the candidate that costs least; the first of them where several do, but for rounding.

    Args:
        collective: A key of `ALGORITHMS`.
        nbytes: Bytes of the full buffer.
        shape: Of the group.
        candidates: Names of algorithms that can be run there.
        segment_nbytes: See `Settings`.
        blocking: Whether the caller waits in the call.
        in_window: Whether the array lies in memory that the ranks of a node share.
        reads_memory: Whether the ranks, all of one node, read each other's ordinary arrays.
    """
    cost_s = functools.partial(
        predicted_s,
        segment_nbytes=segment_nbytes,
        blocking=blocking,
        in_window=in_window,
        reads_memory=reads_memory,
    )
    costs_s = {name: cost_s(collective, name, nbytes, shape) for name in candidates}
    limit_s = min(costs_s.values()) * (1 + _ROUNDING)
    return next(name for name in candidates if costs_s[name] <= limit_s)


def predicted_s(
    collective: str,
    name: str,
    nbytes: int,
    shape: Shape,
    *,
    segment_nbytes: int,
    blocking: bool = True,
    in_window: bool = False,
    reads_memory: bool = False,
) -> float:
    """Return the time that an algorithm is thought to take.

    Raises:
        ValueError: No such collective or algorithm.
    """
    if collective not in ALGORITHMS:
        raise ValueError(f"collective: unknown, got {collective!r}; use one of {', '.join(ALGORITHMS)}")
    if name == NATIVE:
        return _native_s(collective, nbytes, shape, blocking=blocking)
    if name in (DIRECT, HIERARCHICAL):
        if collective != "allreduce":
            return _exchange_s(collective, nbytes, shape, blocking=blocking, in_window=in_window)
        largest_brought = _READ_WHOLE_NBYTES / max(1, shape.size - 1) if in_window else _BROUGHT_NBYTES
        if name == DIRECT and blocking and nbytes <= largest_brought:
            return _MEETING_CALL_S + shape.size * _MET_RANK_S + nbytes * shape.size / _STAGED_BYTES_PER_S
        if reads_memory and not in_window and nbytes >= LEAST_READ_NBYTES:
            return _READ_CALL_S + nbytes * 2 * (shape.size - 1) / shape.size / _READ_BYTES_PER_S
        return _shared_memory_s(nbytes, shape, in_window=in_window)
    if name not in ALGORITHMS[collective]:
        raise ValueError(f"algorithm of {collective}: has no price, got {name!r}; name one of the registry")
    num_segments = choose_num_segments(nbytes, segment_nbytes)
    algorithm = ALGORITHMS[collective][name]
    rounds_s, byte_s = _costs(algorithm, shape, num_segments if algorithm.takes_segments else 1)
    return _SCHEDULE_CALL_S + rounds_s + nbytes * byte_s


def _native_s(collective: str, nbytes: int, shape: Shape, *, blocking: bool) -> float:
    """The best schedule's bytes, dearer for large buffers, at the latency of a tree in C."""
    levels_s = _levels(shape.largest) * _NATIVE_LEVEL_S + _levels(shape.num_nodes) * _NATIVE_CROSS_LEVEL_S
    byte_s = min(_costs(algorithm, shape, 1)[1] for algorithm in ALGORITHMS[collective].values())
    if not blocking:
        weighted = nbytes * _NATIVE_BACKGROUND_FACTOR
    elif shape.num_nodes > 1:
        weighted = nbytes * _NATIVE_CROSS_FACTOR
    else:
        weighted = nbytes * (_NATIVE_LARGE_FACTOR if nbytes >= _NATIVE_LARGE_NBYTES else _NATIVE_FACTOR)
    return _NATIVE_CALL_S + levels_s + weighted * byte_s


def _shared_memory_s(nbytes: int, shape: Shape, *, in_window: bool) -> float:
    """Load and store in each node; between nodes a ring at the same time, of each slice on its own."""
    call_s, byte_s = _WINDOW_CALL_S, 1 / _WINDOW_BYTES_PER_S
    if not in_window:
        copied = 2 * (shape.largest - 1) / shape.largest
        call_s, byte_s = _STAGED_CALL_S, 1 / _STAGED_BYTES_PER_S + copied / _PASSED_BYTES_PER_S
        call_s += (shape.largest - 1) * nbytes / _STAGED_PIECE_NBYTES * _STAGED_PIECE_S
    if shape.num_nodes == 1:
        return call_s + nbytes * byte_s
    num_rounds = 2 * (shape.num_nodes - 1)
    cross_byte_s = num_rounds / shape.num_nodes / _CROSS_BYTES_PER_S
    return _SCHEDULE_CALL_S + call_s + num_rounds * _CROSS_ROUND_S + nbytes * max(byte_s, cross_byte_s)


def _exchange_s(collective: str, nbytes: int, shape: Shape, *, blocking: bool, in_window: bool) -> float:
    """Each rank copies what it brings, unless that is shared, and reads what it takes."""
    size = shape.size
    brought = nbytes * {"allgather": 1 / size, "reduce_scatter": (size - 1) / size}.get(collective, 1.0)
    taken = nbytes * (size if collective == "reduce" else 1)
    if in_window:
        return _WINDOW_CALL_S + taken / _COPIED_BYTES_PER_S
    if blocking and brought <= _BROUGHT_NBYTES:
        call_s = _PLAN_CALL_S + size * _MET_RANK_S
    else:
        call_s = _STAGED_CALL_S + (size - 1) * brought / _STAGED_PIECE_NBYTES * _STAGED_PIECE_S
    return call_s + (brought + taken) / _COPIED_BYTES_PER_S


@functools.lru_cache(maxsize=1024)
def _costs(algorithm: Algorithm, shape: Shape, num_segments: int) -> tuple[float, float]:
    """Return the seconds of a schedule's rounds, and those of each byte of the buffer."""
    size = shape.size
    is_alike = algorithm.is_symmetric and shape.smallest == shape.largest
    walked = (1 if shape.num_nodes == 1 else shape.largest) if is_alike else size
    if walked * algorithm.rounds(size, num_segments) > _MOST_WALKED:
        return _costs_by_formula(algorithm, shape, num_segments)
    network = Network(
        latency_s=_ROUND_S,
        bandwidth_bytes_per_s=_BYTES_PER_S,
        reduction_bytes_per_s=_REDUCED_BYTES_PER_S,
        ranks_per_node=shape.largest,
        internode_latency_s=_CROSS_ROUND_S,
        internode_bandwidth_bytes_per_s=_CROSS_BYTES_PER_S,
    )
    # What is moved takes time in proportion to its bytes, so one price tells that of all sizes.
    nbytes = 1 << 20
    cost = price(algorithm, nbytes, size, network, num_segments=num_segments)
    transfer_s = cost.transfer_s * _idleness(algorithm, shape)
    return cost.latency_s, (transfer_s + cost.reduction_s) / nbytes


def _costs_by_formula(algorithm: Algorithm, shape: Shape, num_segments: int) -> tuple[float, float]:
    """Return about the same, or more on several nodes: as if every round crossed nodes."""
    num_rounds = algorithm.rounds(shape.size, num_segments)
    num_chunks = algorithm.chunks_per_buffer(shape.size, num_segments)
    # Where ranks send in turn, down a tree or a chain, a round still moves a chunk.
    moved = max(float(algorithm.volume(shape.size, num_segments)), num_rounds / num_chunks if num_chunks else 0.0)
    byte_s = moved / _BYTES_PER_S + moved * _reduced_share(algorithm, num_chunks) / _REDUCED_BYTES_PER_S
    round_s = _ROUND_S
    if shape.num_nodes > 1:
        round_s = _CROSS_ROUND_S
        sharing = 1 if algorithm.name in _ONE_CROSSES else shape.largest
        byte_s = max(byte_s, moved * sharing * _idleness(algorithm, shape) / _CROSS_BYTES_PER_S)
    return num_rounds * round_s, byte_s


def _idleness(algorithm: Algorithm, shape: Shape) -> float:
    """Return how many times longer transfers take than the bytes on the busiest link."""
    return _CHANGING_PEERS_FACTOR if shape.num_nodes > 1 and algorithm.name not in _SAME_PEERS else 1.0


def _reduced_share(algorithm: Algorithm, num_chunks: int) -> float:
    """Return how much of what a rank receives it reduces: until it holds results, which it then only stores."""
    if algorithm.collective == "allreduce":
        # In one chunk whole buffers are exchanged, and all of them reduced.
        return 1.0 if num_chunks == 1 else 0.5
    return 1.0 if algorithm.collective in ("reduce", "reduce_scatter") else 0.0


def _levels(count: int) -> int:
    """Return the depth of a binary tree over `count` places."""
    return (count - 1).bit_length()
