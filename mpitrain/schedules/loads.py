"""What the rounds of an algorithm load: the busiest port, the busiest link of a node, the rank that reduces most.

Walking the rounds takes about a microsecond per rank and message. `loads_of` walks all ranks that can be the busiest:
those of one node of a symmetric algorithm, else all. `quick_loads` takes milliseconds for any number of ranks: the
algorithms with a round for each rank have formulas here, and of the others, whose rounds are about log2 p, only
such ranks are walked as are the busiest somewhere, which is found to be right or nearly so (see its tests).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from mpitrain.schedules.algorithm import Algorithm
from mpitrain.schedules.rounds import Receive, Round, Send

__all__ = ["Load", "loads_of", "quick_loads"]

# Ranks times rounds up to which all are walked: some tens of milliseconds.
_MOST_WALKED = 20_000


class Load(NamedTuple):
    """The busiest part of each kind in one round, in chunks."""

    port: int
    link: int
    reduced: int
    crosses_nodes: bool
    has_messages: bool


def loads_of(
    algorithm: Algorithm, size: int, ranks_per_node: int | None = None, *, root: int = 0, num_segments: int = 1
) -> Counter[Load]:
    """Return how many rounds of `algorithm` load how much.

    Args:
        algorithm: What to run.
        size: Number of ranks.
        ranks_per_node: Rank r is on node r // ranks_per_node. None: nodes play no role.
        root: The root, where there is one.
        num_segments: The number of segments, where there are any.
    """
    per_node = size if ranks_per_node is None else min(ranks_per_node, size)
    return _walk(
        algorithm, size, per_node, _ranks_to_walk(algorithm, size, per_node), root=root, num_segments=num_segments
    )


def quick_loads(
    algorithm: Algorithm, size: int, ranks_per_node: int | None = None, *, num_segments: int = 1
) -> Counter[Load]:
    """Return about the same as `loads_of` with rank 0 as root, fast for any number of ranks."""
    per_node = size if ranks_per_node is None else min(ranks_per_node, size)
    walked: Sequence[int] = _ranks_to_walk(algorithm, size, per_node)
    if len(walked) * algorithm.rounds(size, num_segments) > _MOST_WALKED:
        if formula := _FORMULAS.get(algorithm.qualified_name):
            return formula(size, per_node, num_segments)
        walked = _busy_ranks(size, per_node)
    return _walk(algorithm, size, per_node, walked, root=0, num_segments=num_segments)


def _walk(
    algorithm: Algorithm, size: int, ranks_per_node: int, ranks: Sequence[int], *, root: int, num_segments: int
) -> Counter[Load]:
    schedules = [algorithm.rounds_of(rank, size, root=root, num_segments=num_segments) for rank in ranks]
    return Counter(_load_of(rounds, ranks, ranks_per_node) for rounds in zip(*schedules, strict=True))


def _ranks_to_walk(algorithm: Algorithm, size: int, ranks_per_node: int) -> range:
    """Return ranks among which are the busiest port and all ranks of the busiest node."""
    if not algorithm.is_symmetric:
        return range(size)
    if ranks_per_node == size:
        # All ranks do the same and no message leaves the node.
        return range(1)
    # When all ranks send d ranks further, a node of m ranks keeps m - d and m - (p - d) of
    # its messages, where these are positive. So all full nodes are alike, and a last one that
    # is not full is no busier: the messages that leave a node do not become fewer with m up
    # to max(d, p - d) >= p/2; and beside a node of more than p/2 ranks there is only one
    # other, which gets as many messages as it sends.
    return range(ranks_per_node)


def _load_of(rounds: Iterable[Round], ranks: Sequence[int], ranks_per_node: int) -> Load:
    port = reduced = 0
    has_messages = False
    # Per node and direction; a key exists as soon as a message crosses, even an empty one.
    links: dict[tuple[int, bool], int] = {}
    for rank, current in zip(ranks, rounds, strict=True):
        if not current.sends and not current.receives:
            continue
        has_messages = True
        port = max(port, _num_chunks(current.sends), _num_chunks(current.receives))
        reduced = max(reduced, _num_chunks(each for each in current.receives if each.reduce))
        node = rank // ranks_per_node
        for is_out, messages in ((True, current.sends), (False, current.receives)):
            for message in messages:
                if message.peer // ranks_per_node != node:
                    key = node, is_out
                    links[key] = links.get(key, 0) + message.stop - message.start
    return Load(port, max(links.values(), default=0), reduced, bool(links), has_messages)


def _num_chunks(messages: Iterable[Send | Receive]) -> int:
    return sum(message.stop - message.start for message in messages)


def _busy_ranks(size: int, ranks_per_node: int) -> list[int]:
    """Return all ranks of the nodes at the ends and at distances from them that are powers of two.

    Trees and exchanges at doubling distances treat ranks by how often two divides them, or their distance from an end.
    """
    marks = {0, size - 1, size // 2}
    distance = 1
    while distance < size:
        marks |= {near for mark in (distance, size - distance) for near in (mark - 1, mark, mark + 1)}
        distance *= 2
    nodes = sorted({min(mark, size - 1) // ranks_per_node for mark in marks})
    return [rank for node in nodes for rank in range(node * ranks_per_node, min((node + 1) * ranks_per_node, size))]


def _ring(num_reducing: int, num_copying: int) -> Callable[[int, int, int], Counter[Load]]:
    """Phases of p - 1 rounds in which each rank sends a chunk to the next."""

    def loads(size: int, ranks_per_node: int, _num_segments: int) -> Counter[Load]:
        crosses = ranks_per_node < size
        counts: Counter[Load] = Counter()
        for reduced, phases in ((1, num_reducing), (0, num_copying)):
            if phases:
                counts[Load(1, int(crosses), reduced, crosses, has_messages=True)] = phases * (size - 1)
        return counts

    return loads


def _chain(size: int, ranks_per_node: int, num_segments: int) -> Counter[Load]:
    """In round i the ranks from i - s + 1 to i pass a segment on; a node's last rank passes it to the next node."""
    counts: Counter[Load] = Counter()
    for index in range(num_segments + size - 2):
        first, last = max(0, index - num_segments + 1), min(index, size - 2)
        crosses = (last + 1) // ranks_per_node > first // ranks_per_node
        counts[Load(1, int(crosses), 0, crosses, has_messages=True)] += 1
    return counts


def _pairwise(size: int, ranks_per_node: int, _num_segments: int) -> Counter[Load]:
    """In round d each rank sends a chunk d ranks further, which stays on a full node for ranks near its other end."""
    counts: Counter[Load] = Counter()
    for distance in range(1, size):
        staying = max(0, ranks_per_node - distance) + max(0, ranks_per_node - (size - distance))
        link = ranks_per_node - staying
        counts[Load(1, link, 0, link > 0, has_messages=True)] += 1
    return counts


_FORMULAS: Mapping[str, Callable[[int, int, int], Counter[Load]]] = {
    "allreduce_ring": _ring(1, 1),
    "reduce_scatter_ring": _ring(1, 0),
    "allgather_ring": _ring(0, 1),
    "broadcast_chain": _chain,
    "alltoall_pairwise": _pairwise,
}
