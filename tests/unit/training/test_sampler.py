from __future__ import annotations

from collections import Counter
from itertools import chain

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mpitrain.training import ShardedSampler

counts = st.integers(1, 200)
sizes = st.integers(1, 9)


def samplers(count: int, size: int, **options: object) -> list[ShardedSampler]:
    return [ShardedSampler(count, rank, size, **options) for rank in range(size)]  # type: ignore[arg-type]


@given(counts, sizes, st.booleans(), st.integers(0, 5))
def test_every_sample_is_taken_and_only_the_first_ones_again(count, size, shuffle, seed) -> None:
    parts = [list(sampler) for sampler in samplers(count, size, shuffle=shuffle, seed=seed)]
    (whole,) = [list(sampler) for sampler in samplers(count, 1, shuffle=shuffle, seed=seed)]
    assert sorted(whole) == list(range(count))
    length = -(-count // size)
    assert [len(part) for part in parts] == [length] * size
    surplus = length * size - count
    expected = Counter(whole)
    expected.update((whole * size)[:surplus])
    assert Counter(index for part in parts for index in part) == expected


@given(counts, sizes, st.booleans())
def test_drop_last_takes_no_sample_twice_and_leaves_less_than_one_per_rank(count, size, shuffle) -> None:
    parts = [list(sampler) for sampler in samplers(count, size, shuffle=shuffle, drop_last=True)]
    taken = [index for part in parts for index in part]
    assert [len(part) for part in parts] == [count // size] * size
    assert len(set(taken)) == len(taken) == count - count % size
    assert set(taken) <= set(range(count))


@given(counts, st.lists(st.tuples(sizes, st.integers(0, 30)), max_size=4), sizes, st.booleans())
def test_resume_at_other_sizes_takes_each_sample_once(count, stages, last_size, drop_last) -> None:
    taken: list[int] = []
    state = ShardedSampler(count, 0, 1, seed=3).state_dict()
    for size, wanted in [*stages, (last_size, count)]:
        group = samplers(count, size, drop_last=drop_last)
        for sampler in group:
            sampler.load_state_dict(state)
        # What is left in full rounds only: the surplus is the subject of the tests above.
        rounds = min(wanted, (count - group[0].done) // size)
        parts = [list(sampler)[:rounds] for sampler in group]
        # In the order of the ranks' turns, this is the order of one process.
        taken += [index for turn in zip(*parts, strict=True) for index in turn]
        for sampler in group:
            sampler.record(rounds * size)
        states = [sampler.state_dict() for sampler in group]
        assert all(other == states[0] for other in states)
        state = states[0]
    assert state["done"] == len(taken) > count - last_size
    assert taken == list(ShardedSampler(count, 0, 1, seed=3))[: len(taken)]


@given(counts, sizes, st.integers(0, 250), st.booleans())
def test_length_is_what_an_iterator_yields(count, size, done, drop_last) -> None:
    for sampler in samplers(count, size, drop_last=drop_last):
        sampler.record(done)
        assert len(list(sampler)) == len(sampler)


@given(st.integers(1, 6), st.integers(1, 8), st.integers(0, 47))
def test_batches_are_those_of_one_process(size, share, extra) -> None:
    batch_size = size * share
    count = batch_size * 3 + extra
    whole = list(ShardedSampler(count, 0, 1, seed=2))
    loaders = [
        torch.utils.data.BatchSampler(sampler, share, drop_last=True)
        for sampler in samplers(count, size, seed=2, drop_last=True)
    ]
    batches = [[*chain(*parts)] for parts in zip(*loaders, strict=True)]
    assert len(batches) == count // batch_size
    for number, batch in enumerate(batches):
        assert sorted(batch) == sorted(whole[number * batch_size : (number + 1) * batch_size])


def test_the_order_depends_on_seed_and_epoch_and_not_on_the_rank() -> None:
    orders = set()
    for seed in range(3):
        sampler = ShardedSampler(50, 0, 1, seed=seed)
        for _ in range(3):
            assert list(sampler) == list(sampler)
            orders.add(tuple(sampler))
            sampler.record(20)
            sampler.next_epoch()
            assert sampler.done == 0
    assert len(orders) == 9


def test_without_shuffle_the_order_is_that_of_the_indices() -> None:
    assert [list(sampler) for sampler in samplers(7, 2, shuffle=False)] == [[0, 2, 4, 6], [1, 3, 5, 0]]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [((0, 0, 1), "count"), ((5, 2, 2), "rank"), ((5, -1, 2), "rank"), ((5, 0, 0), "rank")],
)
def test_arguments_out_of_range_are_refused(arguments, words) -> None:
    with pytest.raises(ValueError, match=words):
        ShardedSampler(*arguments)


def test_the_state_of_other_data_is_refused() -> None:
    sampler = ShardedSampler(5, 0, 1)
    with pytest.raises(ValueError, match="6 samples, got 5"):
        sampler.load_state_dict(ShardedSampler(6, 0, 1).state_dict())
