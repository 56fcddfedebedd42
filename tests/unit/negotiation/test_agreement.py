"""Which announcements fit together, and what is said of those that do not."""

from __future__ import annotations

import pytest

from mpitrain.negotiation.agreement import find_mismatch
from mpitrain.negotiation.announcement import Announcement, Tensor

FLOATS = (Tensor("float32", (2, 3)),)
REDUCED = Announcement("x", "allreduce", FLOATS, "sum")
GATHERED = Announcement("x", "allgather", FLOATS)
SENT = Announcement("x", "broadcast", FLOATS, root=0)
CUT = Announcement("x", "alltoall", FLOATS, splits=(1, 1))


def tensors(*shapes: tuple[int, ...], dtype: str = "float32") -> tuple[Tensor, ...]:
    return tuple(Tensor(dtype, shape) for shape in shapes)


@pytest.mark.parametrize("announcement", [REDUCED, GATHERED, SENT, CUT, Announcement("x", "barrier")])
def test_equal_announcements_fit(announcement: Announcement) -> None:
    assert not find_mismatch(dict.fromkeys(range(3), announcement))


@pytest.mark.parametrize("announcement", [GATHERED, CUT])
def test_first_dimensions_may_differ_where_rows_are_joined(announcement: Announcement) -> None:
    others = [announcement._replace(tensors=tensors((rows, 3)), splits=(rows, 0)) for rows in (0, 5)]
    assert not find_mismatch(dict(enumerate([announcement, *others])))


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (
            REDUCED,
            SENT,
            "Mismatched operations: One rank did an ALLREDUCE, but another rank did an BROADCAST.",
        ),
        (
            REDUCED,
            REDUCED._replace(tensors=tensors((2, 3), dtype="int64")),
            "Mismatched data types: One rank had type float32, but another rank had type int64.",
        ),
        (
            REDUCED,
            REDUCED._replace(tensors=tensors((3, 2))),
            (
                "Mismatched ALLREDUCE tensor shapes: One rank sent a tensor of shape [2, 3], but another rank sent a "
                "tensor of shape [3, 2]."
            ),
        ),
        (
            REDUCED,
            REDUCED._replace(tensors=tensors((6,))),
            (
                "Mismatched ALLREDUCE tensor shapes: One rank sent a tensor of shape [2, 3], but another rank sent a "
                "tensor of shape [6]."
            ),
        ),
        (
            REDUCED,
            REDUCED._replace(tensors=tensors((2, 3), (2, 3))),
            "Mismatched group sizes: One rank sent 1 tensors, but another rank sent 2 tensors.",
        ),
        (
            REDUCED,
            REDUCED._replace(op="max"),
            "Mismatched reduction operation: One rank specified sum, but another rank specified max.",
        ),
        (
            REDUCED,
            REDUCED._replace(prescale=0.5),
            (
                "Mismatched prescale and/or postscale factors: One rank has factors (1.0, 1.0), but another rank has "
                "factors (0.5, 1.0)."
            ),
        ),
        (
            REDUCED,
            REDUCED._replace(postscale=0.5),
            (
                "Mismatched prescale and/or postscale factors: One rank has factors (1.0, 1.0), but another rank has "
                "factors (1.0, 0.5)."
            ),
        ),
        (
            SENT,
            SENT._replace(root=2),
            "Mismatched BROADCAST root ranks: One rank specified root rank 0, but another rank specified root rank 2.",
        ),
        (
            GATHERED,
            GATHERED._replace(tensors=tensors((2, 4))),
            (
                "Mismatched ALLGATHER tensor shapes: One rank sent a tensor of shape [*, 3], but another rank sent a "
                "tensor of shape [*, 4]."
            ),
        ),
        (
            CUT,
            CUT._replace(tensors=tensors((2,))),
            (
                "Mismatched ALLTOALL tensor shapes: One rank sent a tensor of shape [*, 3], but another rank sent a "
                "tensor of shape [*]."
            ),
        ),
    ],
)
def test_each_difference_has_its_message_and_a_line_per_rank(
    first: Announcement, second: Announcement, message: str
) -> None:
    headline, *table = find_mismatch({0: first, 1: first, 2: second}).split("\n")
    assert headline == f"x: {message}"
    assert table == [f"  rank {rank}: {each.describe()}" for rank, each in enumerate((first, first, second))]
    assert table[0] != table[2].replace("rank 2", "rank 0")


def test_factors_that_are_no_number_agree_with_themselves() -> None:
    first, second = (REDUCED._replace(prescale=float("nan")) for _ in range(2))
    assert not find_mismatch({0: first, 1: second})
