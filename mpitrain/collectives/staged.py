"""Collectives on device arrays by way of the host: of their images in pinned memory, with the collectives of the host.

The array is copied to its image in pieces. The host's collective works on those that have arrived, and what is final is
copied back while others are still under way, so that both copies and the messages overlap. What the other ranks see is
a collective of the host: some of them may bring arrays that lie there, and nobody has to know.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from mpitrain.collectives import operations
from mpitrain.collectives.context import Context
from mpitrain.collectives.executor import Task
from mpitrain.collectives.gate import Gate
from mpitrain.collectives.plan import Call, Plan
from mpitrain.memory import allocate_like, flat_view, is_on_device
from mpitrain.memory.device import CallersStream, Image, PinnedArray

__all__ = ["STAGED", "plan_staged"]

STAGED = "staged through pinned memory"


class _Staged:
    """A caller's array on a device, and its image.

    Args:
        context: Of the communicator.
        array: The caller's, or one of its like.
        reads: Whether what it holds matters.
        writes: Whether it gets a result.
        name: What messages call it.
    """

    def __init__(self, context: Context, array: Any, *, reads: bool, writes: bool, name: str) -> None:
        self.view = flat_view(array, name=name, writable=writes)
        self.image = Image(
            PinnedArray(self.view.dtype, self.view.shape), self.view.data, context.settings.device_piece_nbytes
        )
        self.reads = reads
        self._writes = writes

    def gate(self) -> Gate:
        """Return the way in and out of the image for one run."""
        return Gate(self.image, writes=self._writes)


def plan_staged(
    context: Context,
    make_plan: Callable[..., Plan[Any]],
    arguments: Sequence[Any],
    options: dict[str, Any],
    caller: CallersStream,
) -> Plan[Any]:
    """Prepare a collective of which at least one array lies on a device.

    Args:
        context: Of the communicator.
        make_plan: Prepares it on the host.
        arguments: The arrays.
        options: Others; an all-reduce and a broadcast are in place.
        caller: The stream of who calls.

    Raises:
        ValueError, TypeError: Bad argument.
        UnavailableError: CuPy, or what it needs, is missing.
        MemoryError: The device has no room for the result.
    """
    replaces = make_plan in (operations.plan_allreduce, operations.plan_broadcast)
    is_given = make_plan is not operations.plan_broadcast or context.rank == options.get("root", 0)
    staged = {
        position: _Staged(
            context,
            array,
            reads=not position and is_given,
            writes=bool(position) or replaces,
            name="out" if position else "array",
        )
        for position, array in enumerate(arguments)
        if is_on_device(array)
    }
    images = [staged[position].image.host if position in staged else array for position, array in enumerate(arguments)]
    host = make_plan(context, *images, **options)
    return _plan(context, host, list(staged.values()), caller)


def _plan(context: Context, host: Plan[Any], staged: list[_Staged], caller: CallersStream) -> Plan[Any]:
    """Return the plan that runs a plan of the host on images."""

    def arrived() -> Task[None]:
        while not all(each.image.has_arrived for each in staged):
            yield False

    def task(call: Call) -> Task[Any]:
        gates = [each.gate() for each in staged]
        if host.is_gated:
            call = call._replace(gate=gates[0])
        else:
            yield from arrived()
        result = yield from host.task(call)
        for gate in gates:
            gate.give_rest()
        result, images = _to_device(context, staged, result, caller)
        while not all(image.is_settled for image in images):
            yield False
        return result

    def enter() -> None:
        for each in staged:
            each.image.begin(caller.ready, reads=each.reads)

    # What is brought to a meeting of the node's ranks has to be there before.
    prepare = None if host.bring is None else arrived
    return dataclasses.replace(host, task=task, small=None, is_gated=False, enter=enter, prepare=prepare, place=STAGED)


def _to_device(context: Context, staged: list[_Staged], result: Any, caller: CallersStream) -> tuple[Any, list[Image]]:
    """Return what the caller gets for a result of the host, and the images that are still being copied."""
    images = [each.image for each in staged]
    if isinstance(result, tuple):  # of an all-to-all, which says what came from whom
        array, images = _to_device(context, staged, result[0], caller)
        return (array, *result[1:]), images
    for each in staged:
        if result is each.image.host:
            return each.view.owner, images
    if not isinstance(result, PinnedArray):  # nothing, or the host's own
        return result, images
    with caller.current():
        made = allocate_like(staged[0].view, result.shape)
    image = Image(result, flat_view(made, writable=True).data, context.settings.device_piece_nbytes)
    # Memory that has just been allocated may still be used by what the caller has queued.
    image.begin(caller.record(), reads=False)
    image.give(0, result.flat.size)
    return made, [*images, image]
