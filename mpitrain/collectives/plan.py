"""A collective prepared once and run any number of times."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

from mpitrain.collectives.executor import Task
from mpitrain.collectives.gate import Gates
from mpitrain.observe import OperationTrace

if TYPE_CHECKING:
    from mpitrain.collectives.quick import Caller, Quick

__all__ = ["STRAIGHT", "THROUGH_DEVICES", "Call", "Plan", "empty_plan", "is_empty"]

STRAIGHT = "straight to MPI"
"""What the description of a plan says whose device memory MPI sees."""
THROUGH_DEVICES = "through device memory"
"""What the description of a plan says whose arrays pass through device memory that the node shares."""

Result = TypeVar("Result")


class Call(NamedTuple):
    """What distinguishes one run of a plan from another.

    Attributes:
        tag: Tag of the run's messages; no other run in flight has it.
        blocking: The caller waits in this very thread, so MPI calls may block.
        number: How many calls there were on the communicator before; the same on every rank.
        ticket: Place among the calls that use the MPI library's own collectives; -1 if this one does not.
        staging_ticket: Place among the calls that use the node's staging memory; -1 if this one does not.
        trace: Records the run; None if nobody wants to know.
        gates: Of arrays that are still being copied to the host, or from it; None if all lie there.
    """

    tag: int
    blocking: bool
    number: int = 0
    ticket: int = -1
    staging_ticket: int = -1
    trace: OperationTrace | None = None
    gates: Gates | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Plan(Generic[Result]):
    """How to run one collective on given arrays.

    Attributes:
        description: Collective, algorithm, dtype, count and so on; equal on all ranks unless they disagree.
        task: Makes the task of one run.
        uses_native: Whether the task starts a collective of the MPI library.
        uses_staging: Whether the task uses the node's staging memory.
        uses_flags: Whether the task uses the flags of the node.
        nbytes: Bytes of what this rank brings.
        bring: Writes what this rank brings to the meeting of the node's ranks; the task begins when all have come. For
            blocking calls where there is a meeting.
        quick: `quick(caller, shape)` makes what repeats a blocking call without a plan, for arrays of a shape;
            None if it has to be planned each time.
        is_gated: Whether the task heeds the call's gates; else what it works on must have arrived.
        enter: Called in the caller's thread when a run is called for; notes what the caller's stream has queued.
        leave: Called in the caller's thread when it has waited for a run: what its stream queues then comes after it.
        prepare: Makes the task of what has to be waited for before this rank says what it brings.
        fallback: Makes the plan that is run instead if another rank's array lies where this plan cannot be run.
        place: Where it is done, for people, if that is not the host's memory; ranks may differ in it.
    """

    description: str
    task: Callable[[Call], Task[Result]]
    uses_native: bool = False
    uses_staging: bool = False
    uses_flags: bool = False
    nbytes: int = 0
    bring: Callable[[], None] | None = None
    quick: Callable[[Caller, tuple[int, ...]], Quick] | None = None
    is_gated: bool = False
    enter: Callable[[], None] | None = None
    leave: Callable[[], None] | None = None
    prepare: Callable[[], Task[None]] | None = None
    fallback: Callable[[], Plan[Result]] | None = None
    place: str = ""


def empty_plan(description: str) -> Plan[None]:
    """Return a plan that does nothing: its description is compared, and its call has a place in the order."""
    return Plan(description, _nothing)


def is_empty(plan: Plan[Any]) -> bool:
    """Whether a plan does nothing."""
    return plan.task is _nothing


def _nothing(_call: Call) -> Task[None]:
    return None
    yield
