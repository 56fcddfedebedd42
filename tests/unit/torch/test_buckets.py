"""How gradients are shared out to buckets, for any sizes and orders."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from mpitrain.torch.buckets import bucket_layout

SIZES = st.lists(st.tuples(st.integers(0, 100), st.sampled_from(["float32", "bfloat16", "float64"])), max_size=30)
LIMITS = st.integers(1, 300)


def layout_of(
    sizes: list[tuple[int, str]], order: list[int], bucket_nbytes: int = 100, first_bucket_nbytes: int = 10
) -> list[list[int]]:
    return bucket_layout(sizes, order, bucket_nbytes=bucket_nbytes, first_bucket_nbytes=first_bucket_nbytes)


@given(SIZES, st.randoms(use_true_random=False), LIMITS, LIMITS)
def test_properties_of_every_layout(sizes, draw, bucket_nbytes, first_bucket_nbytes):
    order = list(range(len(sizes)))
    draw.shuffle(order)
    layout = layout_of(sizes, order, bucket_nbytes, first_bucket_nbytes)
    # Each gradient is in one bucket, and no bucket is empty.
    assert sorted(position for members in layout for position in members) == sorted(order)
    assert all(layout)
    place = {position: index for index, position in enumerate(order)}
    for members in layout:
        # Within a bucket in the order of arrival, all of one dtype, and no larger than the limit unless one alone is.
        assert members == sorted(members, key=place.__getitem__)
        assert len({sizes[position][1] for position in members}) == 1
        nbytes = sum(sizes[position][0] for position in members)
        assert len(members) == 1 or nbytes <= max(bucket_nbytes, first_bucket_nbytes)
    # Buckets start in the order in which they are complete: none waits for one that is complete later.
    last = [place[members[-1]] for members in layout]
    assert last == sorted(last)


@given(st.lists(st.integers(1, 100), min_size=1, max_size=30))
def test_a_bucket_is_closed_only_when_the_next_gradient_does_not_fit(nbytes):
    sizes = [(each, "float32") for each in nbytes]
    layout = layout_of(sizes, list(range(len(sizes))))
    for index, (members, following) in enumerate(itertools.pairwise(layout)):
        limit = 100 if index else 10
        assert sum(nbytes[position] for position in members) + nbytes[following[0]] > limit


def test_first_bucket_is_small_so_that_communication_starts_early():
    sizes = [(4, "float32")] * 50
    layout = layout_of(sizes, list(reversed(range(50))))
    assert [len(members) for members in layout] == [2, 25, 23]
    assert layout[0] == [49, 48]


def test_first_bucket_is_never_larger_than_the_others():
    assert layout_of([(4, "float32")] * 4, [0, 1, 2, 3], bucket_nbytes=8, first_bucket_nbytes=1000) == [[0, 1], [2, 3]]


def test_dtypes_take_turns_without_closing_each_others_buckets():
    sizes = [(2, "float32"), (2, "float64")] * 4
    layout = layout_of(sizes, list(range(8)))
    assert layout == [[0, 2, 4, 6], [1, 3, 5, 7]]


def test_a_large_gradient_has_a_bucket_of_its_own():
    sizes = [(4, "float32"), (1000, "float32"), (4, "float32")]
    assert layout_of(sizes, [0, 1, 2]) == [[0], [1], [2]]


def test_no_gradients_make_no_buckets():
    assert layout_of([], []) == []
