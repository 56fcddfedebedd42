"""Which error an operation raises for which decision or failure."""

from __future__ import annotations

from mpitrain.errors import (
    CollectiveError,
    CollectiveMismatchError,
    CommError,
    CommTimeoutError,
    MpitrainError,
    RankFailedError,
)
from mpitrain.negotiation.announcement import Decision

__all__ = ["as_collective_error", "error_of", "error_of_closing", "error_of_name"]

# By the reason of a decision.
_ERRORS: dict[str, type[MpitrainError]] = {
    "mismatch": CollectiveMismatchError,
    "absent": CollectiveError,
    "left": RankFailedError,
    "timeout": CommTimeoutError,
    "stalled": CommTimeoutError,
    "broken": CommError,
}


def error_of(decision: Decision) -> MpitrainError:
    """Return what operations raise that are decided to fail."""
    return _ERRORS[decision.reason](decision.error)


def error_of_closing(name: str, closing: Decision) -> MpitrainError:
    """Return what an operation raises that can complete no more."""
    return _ERRORS[closing.reason](f"{name}: cannot complete: {closing.closed}")


def error_of_name(name: str) -> ValueError:
    """Return what an operation raises whose name is in flight; with the beginning of Horovod's words."""
    return ValueError(
        "Requested to allreduce, allgather, or broadcast a tensor with the same name as another tensor that is "
        f"currently being processed: {name!r}; wait for that one, or pass another name"
    )


def as_collective_error(error: BaseException) -> BaseException:
    """Return what an operation raises that failed while it ran."""
    is_fit = isinstance(error, (CollectiveError, ValueError, TypeError, KeyboardInterrupt))
    return error if is_fit else CollectiveError(f"{type(error).__name__}: {error}")
