"""Collectives on device arrays by way of the host: of their images in pinned memory, with the collectives of the host.

The array is copied to its image in pieces. The host's collective works on those that have arrived, and what is final is
copied back while others are still under way, so that both copies and the messages overlap. What the other ranks see is
a collective of the host: some of them may bring arrays that lie there, and nobody has to know.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from mpitrain.collectives import operations
from mpitrain.collectives.context import Context
from mpitrain.collectives.executor import Task
from mpitrain.collectives.gate import Gate, Gates
from mpitrain.collectives.plan import Call, Plan
from mpitrain.memory import allocate_like, flat_view, is_on_device
from mpitrain.memory.device import CallersStream, Image, PinnedArray

__all__ = ["STAGED", "Staged", "StagedRun", "Use", "plan_staged"]

STAGED = "staged through pinned memory"


class Use(NamedTuple):
    """What a collective does with an array.

    Attributes:
        name: What messages call it.
        reads: Whether what it holds matters.
        writes: Whether it is written to.
        is_result: Whether the call returns it.
    """

    name: str
    reads: bool
    writes: bool
    is_result: bool


class Staged:
    """A caller's array on a device, and its image.

    Args:
        context: Of the communicator.
        array: The caller's, or one of its like.
        use: What is done with it.
    """

    def __init__(self, context: Context, array: Any, use: Use) -> None:
        self.view = flat_view(array, name=use.name, writable=use.writes)
        host = PinnedArray(self.view.dtype, self.view.shape)
        self.image = Image(host, self.view.data, context.settings.device_piece_nbytes)
        self.use = use

    def gate(self) -> Gate:
        """Return the way in and out of the image for one run."""
        return Gate(self.image, writes=self.use.writes)


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
    is_broadcast, is_root = make_plan is operations.plan_broadcast, context.rank == options.get("root", 0)
    replaces = is_broadcast or make_plan is operations.plan_allreduce
    uses = (
        Use("array", is_root or not is_broadcast, replaces and not (is_broadcast and is_root), replaces),
        Use("out", reads=False, writes=True, is_result=True),  # of a scatter
    )
    staged = {
        position: Staged(context, array, use)
        for position, (array, use) in enumerate(zip(arguments, uses, strict=False))
        if is_on_device(array)
    }
    images = [staged[position].image.host if position in staged else array for position, array in enumerate(arguments)]
    host = make_plan(context, *images, **options)
    return _plan(context, host, list(staged.values()), caller)


def _plan(context: Context, host: Plan[Any], staged: list[Staged], caller: CallersStream) -> Plan[Any]:
    """Return the plan that runs a plan of the host on images."""

    def arrived() -> Task[None]:
        while not all(each.image.has_arrived for each in staged):
            yield False

    def task(call: Call) -> Task[Any]:
        run = StagedRun(context, staged, caller)
        gates = Gates(run.own if host.is_gated else [], run.adopt)
        if not host.is_gated:
            yield from arrived()
        result = run.take((yield from host.task(call._replace(gates=gates))))
        run.give_rest()
        while not run.are_settled:
            yield False
        return result

    def enter() -> None:
        StagedRun(context, staged, caller).begin()

    # What is brought to a meeting of the node's ranks has to be there before.
    prepare = None if host.bring is None else arrived
    return dataclasses.replace(host, task=task, quick=None, is_gated=False, enter=enter, prepare=prepare, place=STAGED)


class StagedRun:
    """What one run brings and gives back, and the images of that.

    Args:
        context: Of the communicator.
        staged: The caller's arrays on the device.
        caller: The stream of who calls.
    """

    def __init__(self, context: Context, staged: list[Staged], caller: CallersStream) -> None:
        self._context = context
        self._staged = staged
        self._caller = caller
        self._made: list[tuple[Any, Any, Gate]] = []  # a result of the host, that on the device, and its gate
        self._images = [each.image for each in staged]
        self.own = [each.gate() for each in staged]
        """The gates of what is brought."""

    def begin(self) -> None:
        """Begin to copy what the caller had queued when its stream was last taken note of."""
        for each in self._staged:
            each.image.begin(self._caller.ready, reads=each.use.reads)

    @property
    def hosts(self) -> list[PinnedArray]:
        """The images of what is brought."""
        return [each.image.host for each in self._staged]

    @property
    def has_arrived(self) -> bool:
        """Whether they are all there."""
        return all(each.image.has_arrived for each in self._staged)

    def adopt(self, result: PinnedArray) -> Gate:
        """Make the array on the device that gets a result of the host."""
        like = next(each.view for each in self._staged if each.view.dtype is result.dtype)
        with self._caller.current():
            made = allocate_like(like, result.shape)
        data = flat_view(made, writable=True).data
        image = Image(result, data, self._context.settings.device_piece_nbytes)
        # Memory that has just been allocated may still be used by what the caller has queued.
        image.begin(self._caller.record(), reads=False)
        gate = Gate(image, writes=True)
        self._made.append((result, made, gate))
        self._images.append(image)
        return gate

    def take(self, result: Any) -> Any:
        """Return what the caller gets for a result of the host."""
        if isinstance(result, tuple):  # of an all-to-all, which says what came from whom
            return (self.take(result[0]), *result[1:])
        if not isinstance(result, PinnedArray):  # nothing, or the host's own
            return result
        for each in self._staged:
            if result is each.image.host and each.use.is_result:
                return each.view.owner
        if all(host is not result for host, _, _ in self._made):
            self.adopt(result)
        return next(made for host, made, _ in self._made if host is result)

    def give_rest(self) -> None:
        """Everything is final."""
        for gate in [*self.own, *(gate for _, _, gate in self._made)]:
            gate.give_rest()

    @property
    def are_settled(self) -> bool:
        """Whether nothing is being copied."""
        return all(image.is_settled for image in self._images)
