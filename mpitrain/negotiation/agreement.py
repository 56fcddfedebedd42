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
    collectives = _distinct(announcements, lambda announcement: announcement.collective)
    if len(collectives) > 1:
        first, second = (_WORDS[collective] for collective in collectives[:2])
        return f"Mismatched operations: One rank did an {first}, but another rank did an {second}."
    word = _WORDS[announcements[0].collective]
    checks: list[tuple[Callable[[Announcement], object], Callable[[object, object], str]]] = [
        (
            lambda announcement: len(announcement.tensors),
            lambda a, b: f"Mismatched group sizes: One rank sent {a} tensors, but another rank sent {b} tensors.",
        ),
        (
            lambda announcement: [tensor.dtype for tensor in announcement.tensors],
            lambda a, b: f"Mismatched data types: One rank had type {_listed(a)}, but another rank had type {_listed(b)}.",
        ),
        (
            _shapes_to_agree,
            lambda a, b: f"Mismatched {word} tensor shapes: One rank sent a tensor of shape {_listed(a)}, "
            f"but another rank sent a tensor of shape {_listed(b)}.",
        ),
        (
            lambda announcement: announcement.op,
            lambda a, b: f"Mismatched reduction operation: One rank specified {a}, but another rank specified {b}.",
        ),
        (
            lambda announcement: announcement.root,
            lambda a, b: f"Mismatched {word} root ranks: One rank specified root rank {a}, "
            f"but another rank specified root rank {b}.",
        ),
        (
            lambda announcement: (announcement.prescale, announcement.postscale),
            lambda a, b: f"Mismatched prescale and/or postscale factors: One rank has factors {a}, "
            f"but another rank has factors {b}.",
        ),
    ]
    for key, message in checks:
        values = _distinct(announcements, key)
        if len(values) > 1:
            return message(values[0], values[1])
    return ""


def _shapes_to_agree(announcement: Announcement) -> list[list[object]]:
    skipped = 1 if announcement.collective in _RAGGED else 0
    # A mark stands for the first dimension, so that numbers of dimensions are compared all the same.
    return [["*"] * skipped + list(tensor.shape[skipped:]) for tensor in announcement.tensors]


def _distinct(
    announcements: Sequence[Announcement], key: Callable[[Announcement], object]
) -> list[object]:
    values: list[object] = []
    for announcement in announcements:
        value = key(announcement)
        if value not in values:
            values.append(value)
    return values


def _listed(value: object) -> str:
    """Write a list of one as its element: most operations have one tensor."""
    return str(value[0] if isinstance(value, list) and len(value) == 1 else value)
