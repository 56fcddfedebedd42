"""Communicators of in-process ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from mpitrain.collectives import Communicator
from mpitrain.comm import run_ranks
from mpitrain.config import Settings
from tests.support.limits import HANG_S

Result = TypeVar("Result")

# Ranks that are threads of one process would only poll at each other's expense.
SETTINGS = Settings(wait="sleep")


def run_communicators(
    size: int,
    function: Callable[[Communicator], Result],
    *,
    settings: Settings | None = None,
    **world: Any,
) -> list[Result]:
    """Call `function` with the communicator of each of `size` ranks; return the results by rank."""

    def body(transport: Any) -> Result:
        comm = Communicator(transport, settings=settings or SETTINGS)
        try:
            return function(comm)
        finally:
            comm.engine.close()

    return run_ranks(size, body, **{"timeout_s": HANG_S, **world})


def outcome(function: Callable[[], object]) -> BaseException | object:
    """Return what `function` returns or raises."""
    try:
        return function()
    except Exception as error:
        return error
