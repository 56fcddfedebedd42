"""Named operations on device arrays: their images on the host are announced, fused and reduced like any other arrays.

An operation is announced when the images are there, so the thread that starts it waits for nothing, and ranks with
device arrays and ranks with arrays of the host are the same to each other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from mpitrain.collectives import Communicator, Handle, Task
from mpitrain.collectives.staged import StagedRun
from mpitrain.memory import FlatArray
from mpitrain.negotiation.execution import Results

__all__ = ["start_staged"]


def start_staged(
    comm: Communicator,
    description: str,
    views: Sequence[FlatArray],
    start: Callable[[list[Any]], Handle[Results]],
    refuse: Callable[[str], None],
    *,
    in_place: bool,
) -> Handle[Results]:
    """Start an operation of which all arrays lie on this rank's device, in the caller's thread.

    Args:
        comm: The group.
        description: For messages.
        views: Of the arrays.
        start: Starts it on arrays of the host; what it raises is raised where the handle is waited for.
        refuse: Called instead, with what is wrong, if it does not come to that.
        in_place: Whether results replace the arrays.

    Raises:
        ValueError: An array on the device of another rank.
        UnavailableError: CuPy, or what it needs, is missing.
    """
    run = comm.devices.stage(views, in_place=in_place)
    return comm.engine.start(_staged(run, start, refuse), description)


def _staged(
    run: StagedRun, start: Callable[[list[Any]], Handle[Results]], refuse: Callable[[str], None]
) -> Task[Results]:
    try:
        while not run.has_arrived:
            yield False
        handle = start(list(run.hosts))
    except BaseException as error:
        # Nothing was announced, and others may wait for it.
        refuse(f"{type(error).__name__}: {error}")
        raise
    while not handle.done:
        yield False
    results = [run.take(result) for result in handle.wait()]
    run.give_rest()
    while not run.are_settled:
        yield False
    return results
