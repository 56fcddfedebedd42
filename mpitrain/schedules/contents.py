"""What each collective starts from and must end with, in symbols.

Terms: a chunk is represented by an integer, its *content*; 0 is undefined. Where a collective
reduces, the content is a bit mask of the ranks whose contributions have been reduced into
the chunk; elsewhere it is a label that is unique among the contents which the same
chunk number may take. In a barrier each rank has one such mask, of the ranks it has heard of.
"""

from __future__ import annotations

from collections.abc import Mapping

from mpitrain.schedules.algorithm import Algorithm

__all__ = ["UNDEFINED", "initial_contents", "is_reducing", "required_contents"]

UNDEFINED = 0

_REDUCING = frozenset({"allreduce", "reduce_scatter", "reduce"})


def is_reducing(collective: str) -> bool:
    """Return whether received chunks may be reduced into local ones."""
    return collective in _REDUCING


def initial_contents(algorithm: Algorithm, rank: int, size: int, *, root: int, num_segments: int) -> list[int]:
    """Return the contents of the chunks of `rank` before the first round."""
    num_chunks = algorithm.num_chunks(size, num_segments)
    own = 1 << rank
    collective = algorithm.collective
    if is_reducing(collective):
        return [own] * num_chunks
    if collective in {"allgather", "gather"}:
        return [own if chunk == rank else UNDEFINED for chunk in range(num_chunks)]
    if collective in {"broadcast", "scatter"}:
        return [own if rank == root else UNDEFINED] * num_chunks
    if collective == "alltoall":
        to_send = [_label(rank, dest, size) for dest in range(size)]
        arriving = [UNDEFINED] * size
        arriving[rank] = to_send[rank]
        return to_send + arriving
    if collective == "barrier":
        return [own]
    raise ValueError(f"collective: unknown, got {collective!r}; pass one of the registry")


def required_contents(algorithm: Algorithm, rank: int, size: int, *, root: int, num_segments: int) -> Mapping[int, int]:
    """Return chunk -> content for the chunks that `rank` must hold after the last round."""
    chunks = range(algorithm.num_chunks(size, num_segments))
    everyone = (1 << size) - 1
    match algorithm.collective:
        case "reduce" | "gather" if rank != root:
            required = {}
        case "allreduce" | "reduce":
            required = dict.fromkeys(chunks, everyone)
        case "reduce_scatter":
            required = {rank: everyone}
        case "allgather" | "gather":
            required = {chunk: 1 << chunk for chunk in chunks}
        case "broadcast":
            required = dict.fromkeys(chunks, 1 << root)
        case "scatter":
            required = {rank: 1 << root}
        case "alltoall":
            required = {size + source: _label(source, rank, size) for source in range(size)}
        case "barrier":
            required = {0: everyone}
        case unknown:
            raise ValueError(f"collective: unknown, got {unknown!r}; pass one of the registry")
    return required


def _label(source: int, dest: int, size: int) -> int:
    return 1 + source * size + dest
