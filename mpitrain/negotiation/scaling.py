"""What surrounds a reduction: the factors before and after it, and the division of an average."""

from __future__ import annotations

from mpitrain.memory import FlatArray, check_op, divide_by, parse_op, scale
from mpitrain.negotiation.announcement import Announcement

__all__ = ["check_reduction", "op_to_run", "scale_input", "scale_result"]


def check_reduction(announcement: Announcement, view: FlatArray) -> None:
    """Refuse what has no meaning, which it has on no rank; before anything is started or changed.

    Raises:
        TypeError: The reduction is not defined for the dtype.
    """
    check_op(parse_op(announcement.op), view.dtype)


def op_to_run(announcement: Announcement) -> str:
    """Return the reduction to run: an average is a sum that is divided afterwards, together with the scaling."""
    return "sum" if announcement.op == "average" else announcement.op


def scale_input(view: FlatArray, announcement: Announcement) -> None:
    """Apply the factor for inputs, in place."""
    if announcement.prescale != 1.0:
        scale(view.data, announcement.prescale, view.dtype)


def scale_result(view: FlatArray, announcement: Announcement, size: int) -> None:
    """Divide an average and apply the factor for results, in one step: integers are truncated once."""
    if announcement.op == "average" and announcement.postscale == 1.0:
        divide_by(view.data, size, view.dtype)
    elif announcement.op == "average":
        scale(view.data, announcement.postscale / size, view.dtype)
    elif announcement.postscale != 1.0:
        scale(view.data, announcement.postscale, view.dtype)
