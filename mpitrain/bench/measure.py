"""Measures a collective: every side at every size, checked first, then timed in turn."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from mpitrain.bench.bandwidth import COLLECTIVES
from mpitrain.bench.operation import MEMORIES, REDUCING, Operation, Use
from mpitrain.bench.results import Row
from mpitrain.bench.rivals import Rival
from mpitrain.bench.stopwatch import Effort, interleaved_times
from mpitrain.collectives import Communicator
from mpitrain.memory import as_dtype, check_op, parse_op

__all__ = ["Request", "measure", "sizes_between"]


def sizes_between(low: int, high: int, factor: int) -> list[int]:
    """Return sizes from `low` on, each by the factor larger than the one before; the last is `high`."""
    sizes = []
    nbytes = low
    while nbytes < high:
        sizes.append(nbytes)
        nbytes *= factor
    return [*sizes, high]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What to measure.

    Attributes:
        collective: One of `COLLECTIVES`.
        sizes: In bytes, of the full buffer.
        dtypes: Names of element types.
        ops: Names of reductions; ignored where nothing is reduced.
        algorithms: Names of ours; empty for all that there are.
        memories: See `operation.Use`.
        in_place: See `operation.Use`, as for `persistent`.
        effort: At each size.
        check: Whether to check the results of every side at every size.
    """

    collective: str
    sizes: tuple[int, ...]
    dtypes: tuple[str, ...] = ("float32",)
    ops: tuple[str, ...] = ("sum",)
    algorithms: tuple[str, ...] = ()
    memories: tuple[str, ...] = ("host",)
    in_place: bool = False
    persistent: bool = False
    effort: Effort
    check: bool = True

    def __post_init__(self) -> None:
        """Check what can be checked without ranks.

        Raises:
            ValueError: Something is unknown or does not fit.
        """
        if self.collective not in COLLECTIVES:
            raise ValueError(f"collective: unknown, got {self.collective!r}; use one of {', '.join(COLLECTIVES)}")
        for memory in self.memories:
            if memory not in MEMORIES:
                raise ValueError(f"memory: unknown, got {memory!r}; use {', '.join(MEMORIES)}")
        for use in self.uses():
            try:
                check_op(parse_op(use.op), as_dtype(use.dtype))
            except TypeError as error:
                raise ValueError(str(error)) from None

    def uses(self) -> list[Use]:
        """Return the ways to call the collective, those that are compared side by side."""
        ops = self.ops if self.collective in REDUCING else ("sum",)
        return [
            Use(self.collective, dtype, op, memory, self.in_place, self.persistent)
            for dtype in self.dtypes
            for op in ops
            for memory in self.memories
        ]


def measure(comm: Communicator, request: Request, rivals: Sequence[Rival] = ()) -> Iterator[list[Row]]:
    """Measure all sides; yield their rows at one size after another. Every rank must exhaust it.

    Args:
        comm: Of the ranks.
        request: Same on every rank.
        rivals: Other libraries to compare with, in the same rounds.

    Raises:
        ValueError: No such algorithm.
        UnavailableError: Memory that is not to be had here; on every rank.
    """
    uses = request.uses()
    per_group = len(request.memories)
    for begin in range(0, len(uses), per_group):
        group = uses[begin : begin + per_group]
        done: set[int] = set()
        for nbytes in request.sizes:
            operations = [Operation(comm, use, nbytes) for use in group]
            # Two small sizes may become the same number of elements.
            if operations[0].nbytes not in done:
                done.add(operations[0].nbytes)
                yield _measure_size(comm, request, operations, rivals)
            # The last size's memory is given back before the next one's is taken.
            del operations


def _measure_size(
    comm: Communicator, request: Request, operations: Sequence[Operation], rivals: Sequence[Rival]
) -> list[Row]:
    sides: dict[tuple[str, str], tuple[Operation, Callable[[], Any]]] = {}
    for operation in operations:
        memory = operation.use.memory
        for name in request.algorithms or comm.known_algorithms(request.collective):
            if memory != "device":  # our collectives work on arrays of the host
                sides[name, memory] = (operation, operation.call(name))
        if memory != "window":
            for rival in rivals:
                if (call := rival.call(operation)) is not None:
                    sides[rival.name, memory] = (operation, call)
    if not sides:
        raise ValueError("sides: nothing to measure, as only NCCL works on device memory; add --compare nccl")
    wrong = {key: operation.count_wrong(call) if request.check else -1 for key, (operation, call) in sides.items()}
    for operation in operations:
        operation.clear()
    labels = {key: ", ".join(key) for key in sides}
    times = interleaved_times(comm, {labels[key]: call for key, (_, call) in sides.items()}, request.effort)
    return [
        Row(
            dtype=operation.use.dtype,
            op=operation.use.op if request.collective in REDUCING else "",
            nbytes=operation.nbytes,
            count=operation.count,
            side=key[0],
            memory=key[1],
            iterations=len(times.samples_s[labels[key]]),
            repeats=times.repeats[labels[key]],
            median_s=times.medians_s[labels[key]],
            p5_s=times.percentile_s(labels[key], 5),
            p95_s=times.percentile_s(labels[key], 95),
            wrong=wrong[key],
        )
        for key, (operation, _) in sides.items()
    ]
