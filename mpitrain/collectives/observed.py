"""What shared-memory operations work on while a timeline is recorded: the same, but saying what they do.

The algorithms know nothing of it. They tell each other by flags how far they are, and whoever stands between them and
the flags knows, too.
"""

from __future__ import annotations

from typing import Any, cast

from numpy.typing import NDArray

from mpitrain.collectives.across import AcrossNodes
from mpitrain.collectives.direct import NEXT_STEPS
from mpitrain.collectives.executor import Task
from mpitrain.collectives.node import Flags, Node
from mpitrain.collectives.reduction import Reduction
from mpitrain.observe import OperationTrace

__all__ = ["ObservedAcross", "observed_node"]


def observed_node(node: Node, trace: OperationTrace) -> Node:
    """Return a node whose flags tell `trace` what they say."""
    return cast("Node", _ObservedNode(node, trace))


class _ObservedNode:
    """Everything of a node but the flags is its own."""

    def __init__(self, node: Node, trace: OperationTrace) -> None:
        vars(self).update(_node=node, flags=_ObservedFlags(node.flags, trace))

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["_node"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(vars(self)["_node"], name, value)


class _ObservedFlags:
    def __init__(self, flags: Flags, trace: OperationTrace) -> None:
        self._flags = flags
        self._trace = trace

    def signal(self, phase: int, number: int, part: int = 0) -> None:
        self._trace.enter("")
        self._flags.signal(phase, number, part)

    def show(self, number: int, source: int, target: int) -> None:
        self._trace.enter("")
        self._flags.show(number, source, target)

    def shown(self, number: int) -> list[tuple[int, int]] | None:
        shown = self._flags.shown(number)
        if shown is not None:
            self._trace.enter(NEXT_STEPS[0])
        return shown

    def take_back(self, number: int) -> None:
        self._flags.take_back(number)

    def was_taken_back(self, number: int) -> bool:
        return self._flags.was_taken_back(number)

    def reached(self, phase: int, number: int, part: int = 0) -> bool:
        have_reached = self._flags.reached(phase, number, part)
        if have_reached:
            self._trace.enter(NEXT_STEPS[phase])
        return have_reached


class ObservedAcross:
    """A crossing of nodes that tells what its messages do."""

    def __init__(self, across: AcrossNodes, trace: OperationTrace) -> None:
        self._across = across
        self._trace = trace
        self.num_slices = across.num_slices

    def allreduce(self, data: NDArray[Any], reduction: Reduction, tag: int) -> Task[None]:
        """Return the task that reduces `data` in place; see `direct.Across`."""
        yield from self._across.allreduce(data, reduction, tag, self._trace)
        self._trace.enter(NEXT_STEPS[0])
