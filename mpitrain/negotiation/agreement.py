"""Do the announcements of all ranks fit together? The messages begin as Horovod's do."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from mpitrain.negotiation.announcement import Announcement

__all__ = ["find_mismatch"]

# Horovod's word for each collective in its messages.
_WORDS = {
    "allreduce": "ALLREDUCE",
    "allgather": "ALLGATHER",
    "broadcast": "BROADCAST",
    "alltoall": "ALLTOALL",
    "reduce_scatter": "REDUCESCATTER",
    "barrier": "BARRIER",
    "step": "STEP",
}
# Collectives whose arrays may differ in the first dimension.
_RAGGED = ("allgather", "alltoall")


def find_mismatch(announcements: Mapping[int, Announcement]) -> str:
    """Compare what the ranks announced under one name.

    Args:
        announcements: By rank; all ranks that take part.

    Returns:
        "" if they fit together, else the error with a line per rank.
    """
    ordered = [announcements[rank] for rank in sorted(announcements)]
    problem = _first_problem(ordered)
    if not problem:
        return ""
    table = [f"  rank {rank}: {announcements[rank].describe()}" for rank in sorted(announcements)]
    return "\n".join([f"{ordered[0].name}: {problem}", *table])


def _first_problem(announcements: Sequence[Announcement]) -> str:
    if any(announcement.problem for announcement in announcements):
        return "One rank has unusable arguments, and has raised an error of its own."
    collectives = _distinct(announcements, lambda each: each.collective)
    if len(collectives) > 1:
        first, second = (_WORDS[collective] for collective in collectives[:2])
        return f"Mismatched operations: One rank did an {first}, but another rank did an {second}."
    word = _WORDS[announcements[0].collective]
    # What must be equal, as messages write it, and what a message says of two that are not.
    checks: list[tuple[Callable[[Announcement], str], str]] = [
        (
            lambda each: str(len(each.tensors)),
            "Mismatched group sizes: One rank sent {} tensors, but another rank sent {} tensors.",
        ),
        (
            lambda each: ", ".join(tensor.dtype for tensor in each.tensors),
            "Mismatched data types: One rank had type {}, but another rank had type {}.",
        ),
        (
            _shapes_to_agree,
            (
                f"Mismatched {word} tensor shapes: One rank sent a tensor of shape {{}}, "
                "but another rank sent a tensor of shape {}."
            ),
        ),
        (
            lambda each: each.op,
            "Mismatched reduction operation: One rank specified {}, but another rank specified {}.",
        ),
        (
            lambda each: str(each.root),
            (
                f"Mismatched {word} root ranks: One rank specified root rank {{}}, "
                "but another rank specified root rank {}."
            ),
        ),
        (
            lambda each: f"({each.prescale!r}, {each.postscale!r})",
            "Mismatched prescale and/or postscale factors: One rank has factors {}, but another rank has factors {}.",
        ),
    ]
    for write, message in checks:
        values = _distinct(announcements, write)
        if len(values) > 1:
            return message.format(*values[:2])
    return ""


def _shapes_to_agree(announcement: Announcement) -> str:
    if announcement.collective not in _RAGGED:
        return ", ".join(str(list(tensor.shape)) for tensor in announcement.tensors)
    # A mark stands for the first dimension, so that numbers of dimensions are compared all the same.
    shapes = [["*", *map(str, tensor.shape[1:])] for tensor in announcement.tensors]
    return ", ".join(f"[{', '.join(shape)}]" for shape in shapes)


def _distinct(announcements: Sequence[Announcement], write: Callable[[Announcement], str]) -> list[str]:
    return list(dict.fromkeys(write(each) for each in announcements))
