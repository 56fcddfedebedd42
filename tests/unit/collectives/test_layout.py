from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpitrain.collectives.layout import Layout, even_counts


@given(st.integers(0, 10**9), st.integers(1, 1000))
def test_even_counts_add_up_and_differ_by_one_at_most(count, parts):
    counts = even_counts(count, parts)
    assert len(counts) == parts
    assert sum(counts) == count
    assert max(counts) - min(counts) <= 1
    assert list(counts) == sorted(counts, reverse=True)


def test_packed_puts_chunks_one_after_another_in_each_array():
    layout = Layout.packed((2, 0, 3), (4, 1))
    assert layout.counts == (2, 0, 3, 4, 1)
    assert layout.offsets == (0, 2, 2, 0, 4)
    assert layout.arrays == (0, 0, 0, 1, 1)
    assert layout.span(0, 3) == (0, 0, 5)
    assert layout.span(3, 5) == (1, 0, 5)
    assert layout.span(1, 2) == (0, 2, 0)


def test_compact_holds_only_what_is_touched():
    layout = Layout.compact((5, 6, 7, 8), (3, 1))
    assert layout.offsets == (-1, 0, -1, 6)
    assert layout.span(3, 4) == (0, 6, 8)
    with pytest.raises(AssertionError):
        layout.span(0, 1)


def test_chunks_of_two_arrays_are_no_span():
    with pytest.raises(AssertionError):
        Layout.packed((1,), (1,)).span(0, 2)
