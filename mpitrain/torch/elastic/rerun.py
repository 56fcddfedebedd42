"""Calls a function again and again, until it has returned on all ranks."""

from __future__ import annotations

import enum
import functools
import logging
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeVar

from mpitrain.collectives import Communicator
from mpitrain.errors import CollectiveError, HostsUpdatedInterrupt
from mpitrain.torch.elastic.state import State
from mpitrain.torch.world import communicator, init_again, shutdown

__all__ = ["run"]

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")
AnyState = TypeVar("AnyState", bound=State)

_log = logging.getLogger("mpitrain")


class _End(enum.Enum):
    """How an attempt ended on one rank."""

    RETURNED = enum.auto()
    FAILED = enum.auto()
    INTERRUPTED = enum.auto()
    INTERRUPTED_IN_SYNC = enum.auto()


def run(func: Callable[Concatenate[AnyState, Parameters], Result]) -> Callable[..., Result]:
    """Make a training function elastic. Every rank must call it, with its state as the first argument.

    The state is synchronised with that of rank 0 and the function called. Where it raises `HorovodInternalError`, the
    state goes back to the last commit; where it raises `HostsUpdatedInterrupt`, it stays as it is. Then all ranks shut
    down, initialise anew as `init` was called before, call `state.on_reset()`, and begin again, until the function has
    returned on all ranks. A rank on which it has returned waits for the others, as they may need it once more.

    No collective may be called between `init` and this.

    Args:
        func: Takes the state and any further arguments, the same on every rank.

    Raises:
        RankFailedError: A process of the job has ended, on every rank that is left. Without it, the ranks cannot be
            initialised anew.
        CommRevokedError: On another rank, the function or a callback has raised something else.
    """

    @functools.wraps(func)
    def elastic(state: AnyState, *args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        world = communicator()
        # It outlives `shutdown`: by it the ranks tell one another how an attempt went, or learn that one has gone.
        # Checked, as an unchecked collective of MPI learns of nothing; without a time limit, as nobody knows how long
        # the slowest rank takes for the rest of its attempt.
        control = world.duplicate(world.settings.replace(timeout_s=0.0, check=True))
        try:
            return _run_to_the_end(control, func, state, args, kwargs)
        except BaseException as error:
            control.revoke(f"elastic run: {type(error).__name__}: {error}")
            raise

    return elastic


def _run_to_the_end(
    control: Communicator, function: Callable[..., Result], state: State, args: Any, kwargs: Any
) -> Result:
    is_synced = False
    while True:
        end, result = _attempt(control, function, state, is_synced, args, kwargs)
        ends = control.allgather_obj(end)
        if all(each is _End.RETURNED for each in ends):
            return result  # type: ignore[return-value]
        # A rank that synchronises alone would wait for the others.
        is_synced = all(each is _End.INTERRUPTED_IN_SYNC for each in ends)
        shutdown()
        init_again()
        state.on_reset()


def _attempt(
    control: Communicator, function: Callable[..., Result], state: State, is_synced: bool, args: Any, kwargs: Any
) -> tuple[_End, Result | None]:
    try:
        if not is_synced:
            state.sync()
        return _End.RETURNED, function(state, *args, **kwargs)
    except CollectiveError as error:
        _log.warning("r%d/%d | goes back to the last commit: %s", control.rank, control.size, error)
        try:
            state.restore()
        finally:
            # Others that wait for this rank learn that it gives up.
            shutdown()
        return _End.FAILED, None
    except HostsUpdatedInterrupt as interrupt:
        shutdown()
        return _End.INTERRUPTED_IN_SYNC if interrupt.skip_sync else _End.INTERRUPTED, None
