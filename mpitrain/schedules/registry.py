"""All algorithms, and the conventions on chunks that they obey.

The executor relies on what each collective finds in the chunks and leaves there:

    collective      chunks      a rank starts with             a rank ends with
    allreduce       see below   its contribution to all        all, fully reduced
    reduce_scatter  p           its contribution to all        chunk `rank` fully reduced
    allgather       p           chunk `rank`                   all
    broadcast       see below   all on the root                all
    reduce          1           its contribution               the reduction, on the root
    gather          p           chunk `rank`                   all, on the root
    scatter         p           all on the root                chunk `rank`
    alltoall        2p          chunks 0 to p-1 to be sent     chunks p to 2p-1 received
    barrier         0           nothing                        nothing; messages are signals

A chunk that is not named on the right is undefined at the end. An all-reduce has p chunks
(ring), 1 (recursive_doubling), the largest power of two up to p (halving_doubling), or
2s for s segments (double_tree); a broadcast 1 (binomial), p (scatter_allgather) or s
(chain). `Algorithm.num_chunks` says so.

A message is a contiguous range of chunks and has the same chunk numbers at both ends,
except in an all-to-all (`Algorithm.renumbers_chunks`): there rank r sends chunk d to rank
d, which stores it as chunk p + r. Chunk p + r of rank r itself is placed by the caller.

Chunks may have different sizes, zero included; a schedule knows only their numbers. With
size 1 there are no messages.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from mpitrain.schedules import (
    allgather_bruck,
    allgather_recursive_doubling,
    allgather_ring,
    allreduce_double_tree,
    allreduce_halving_doubling,
    allreduce_recursive_doubling,
    allreduce_ring,
    alltoall_pairwise,
    barrier_dissemination,
    broadcast_binomial,
    broadcast_chain,
    broadcast_scatter_allgather,
    gather_binomial,
    reduce_binomial,
    reduce_scatter_recursive_halving,
    reduce_scatter_ring,
    scatter_binomial,
)
from mpitrain.schedules.algorithm import Algorithm

__all__ = ["ALGORITHMS", "Algorithm", "find_algorithm"]

_MODULES = (
    allreduce_ring,
    allreduce_double_tree,
    allreduce_recursive_doubling,
    allreduce_halving_doubling,
    reduce_scatter_ring,
    reduce_scatter_recursive_halving,
    allgather_ring,
    allgather_bruck,
    allgather_recursive_doubling,
    broadcast_binomial,
    broadcast_scatter_allgather,
    broadcast_chain,
    reduce_binomial,
    gather_binomial,
    scatter_binomial,
    alltoall_pairwise,
    barrier_dissemination,
)


def _by_collective() -> Mapping[str, Mapping[str, Algorithm]]:
    table: dict[str, dict[str, Algorithm]] = {}
    for module in _MODULES:
        algorithm: Algorithm = module.ALGORITHM
        table.setdefault(algorithm.collective, {})[algorithm.name] = algorithm
    return MappingProxyType({key: MappingProxyType(row) for key, row in table.items()})


ALGORITHMS: Mapping[str, Mapping[str, Algorithm]] = _by_collective()
"""Collective -> name -> algorithm, in the order of `docs/algorithms.md`."""


def find_algorithm(collective: str, name: str) -> Algorithm:
    """Return the algorithm `name` of `collective`.

    Raises:
        ValueError: There is none; the message lists those that there are.
    """
    if collective not in ALGORITHMS:
        known = ", ".join(ALGORITHMS)
        raise ValueError(f"collective: unknown, got {collective!r}; pass one of {known}")
    if name not in ALGORITHMS[collective]:
        known = ", ".join(ALGORITHMS[collective])
        raise ValueError(f"{collective} algorithm: unknown, got {name!r}; pass one of {known}")
    return ALGORITHMS[collective][name]
