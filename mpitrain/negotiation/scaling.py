"""What surrounds a reduction: the factors before and after it, and the division of an average."""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

from mpitrain.memory import DType, FlatArray, check_op, divide_by, parse_op, scale
from mpitrain.negotiation.announcement import Announcement

__all__ = ["check_reduction", "op_to_run", "scale_input", "scale_result"]


def check_reduction(announcement: Announcement, view: FlatArray) -> None:
    """Refuse what has no meaning, which it has on no rank; before anything is started or changed.

    Raises:
        TypeError: The reduction is not defined for the dtype.
    """
    check_op(parse_op(announcement.op), view.dtype)


def op_to_run(op: str) -> str:
    """Return the reduction to run: an average is a sum that is divided afterwards, together with the scaling."""
    return "sum" if op == "average" else op


def scale_input(data: NDArray[Any], dtype: DType, prescale: float) -> None:
    """Apply the factor for inputs, in place."""
    if prescale != 1.0:
        scale(data, prescale, dtype)


def scale_result(data: NDArray[Any], dtype: DType, op: str, postscale: float, size: int) -> None:
    """Divide an average and apply the factor for results, in one step: integers are truncated once."""
    if op == "average" and postscale == 1.0:
        divide_by(data, size, dtype)
    elif op == "average":
        scale(data, postscale / size, dtype)
    elif postscale != 1.0:
        scale(data, postscale, dtype)
