"""The books of an `ElasticSampler`, for ranks that are made up."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

import mpitrain.torch as hvd  # noqa: E402
from mpitrain.torch.elastic import ElasticSampler, sampler  # noqa: E402


class Ranks:
    """One sampler per rank of a world that can change its size."""

    def __init__(self, monkeypatch, size, count, **options):
        self.monkeypatch = monkeypatch
        self.size = size
        self.samplers = [self.as_rank(rank, lambda: ElasticSampler(range(count), **options)) for rank in range(size)]

    def as_rank(self, rank, function):
        self.monkeypatch.setattr(sampler, "rank", lambda: rank)
        self.monkeypatch.setattr(sampler, "size", lambda: self.size)
        return function()

    def restart(self, size):
        """Go on with another number of ranks from the state of rank 0."""
        state, kept = self.samplers[0].state_dict(), self.samplers[0]
        self.size = size
        self.samplers = []
        for rank in range(size):
            made = self.as_rank(rank, lambda: ElasticSampler(kept.dataset, kept.shuffle, kept.seed))
            self.as_rank(rank, lambda made=made: made.load_state_dict(state))
            self.samplers.append(made)


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize(("count", "size"), [(0, 2), (1, 4), (7, 3), (12, 4), (13, 1)])
def test_every_sample_is_dealt_out_and_every_rank_has_as_many(monkeypatch, count, size, shuffle):
    ranks = Ranks(monkeypatch, size, count, shuffle=shuffle, seed=3)
    dealt = [list(each) for each in ranks.samplers]
    length = -(-count // size)
    assert [len(each) for each in ranks.samplers] == [len(indices) for indices in dealt] == [length] * size
    times = Counter(index for indices in dealt for index in indices)
    assert set(times) == set(range(count))
    assert sum(times.values()) == ranks.samplers[0].total_size
    # With fewer samples than ranks they go round more than once.
    assert not times or max(times.values()) <= -(-size // count) + 1


def test_the_order_is_that_of_horovod_and_changes_with_the_epoch(monkeypatch):
    first = Ranks(monkeypatch, 1, 20, seed=5).samplers[0]
    orders = []
    for epoch in range(3):
        first.set_epoch(epoch)
        expected = list(range(20))
        random.Random(5 + epoch).shuffle(expected)
        assert list(first) == expected
        orders.append(tuple(first))
    assert len(set(orders)) == 3
    unshuffled = Ranks(monkeypatch, 2, 5, shuffle=False).samplers
    assert [list(each) for each in unshuffled] == [[0, 2, 4], [1, 3, 0]]


@given(
    count=st.integers(1, 60),
    phases=st.lists(st.tuples(st.integers(1, 5), st.integers(0, 3), st.integers(1, 4)), min_size=1, max_size=5),
    data=st.data(),
)
def test_whatever_the_sizes_no_sample_is_left_out_and_none_done_is_done_again(count, phases, data):
    with pytest.MonkeyPatch.context() as monkeypatch:
        ranks = Ranks(monkeypatch, 1, count, seed=1)
        done = Counter()
        for size, num_batches, batch_size in phases:
            ranks.restart(size)
            assert all(each.processed_indices == set(done) for each in ranks.samplers)
            dealt = [list(each) for each in ranks.samplers]
            # A rank notes a few out of order, which the sampler is then told everywhere.
            singles = data.draw(st.sets(st.sampled_from(dealt[0]), max_size=2)) if dealt[0] else set()
            for index in range(num_batches):
                for rank, each in enumerate(ranks.samplers):
                    done.update(set(dealt[rank][index * batch_size : (index + 1) * batch_size]))
                    each.record_batch(index, batch_size)
            for each in ranks.samplers:
                each.record_indices(singles)
            done.update(singles - set(done))
        assert ranks.samplers[0].processed_indices == set(done)
        ranks.restart(3)
        left = {index for each in ranks.samplers for index in each}
        assert left == set(range(count)) - set(done)


def test_a_new_epoch_begins_with_everything(monkeypatch):
    (only,) = Ranks(monkeypatch, 1, 6).samplers
    only.record_batch(0, 2)
    only.record_indices([5, 4])
    assert only.state_dict() == {"epoch": 0, "processed_num": 2, "processed_indices": [4, 5]}
    only.set_epoch(1)
    assert only.state_dict() == {"epoch": 1, "processed_num": 0}
    assert only.processed_indices == set()
    assert sorted(only) == list(range(6))


def test_what_was_recorded_counts_from_the_next_reset_on(monkeypatch):
    (only,) = Ranks(monkeypatch, 1, 6, shuffle=False).samplers
    only.record_batch(0, 2)
    assert list(only) == [0, 1, 2, 3, 4, 5]
    only.reset()
    assert list(only) == only.remaining_indices == [2, 3, 4, 5]
    assert (only.num_replicas, only.rank, only.num_samples, only.processed_num) == (1, 0, 4, 2)


@pytest.mark.parametrize(
    ("state", "left"),
    [
        ({"epoch": 2, "processed_num": 3}, [3, 4, 5]),
        ({"epoch": 2, "processed_indices": {1, 4}}, [0, 2, 3, 5]),
        ({"epoch": 2, "processed_num": 2, "processed_indices": [0, 4]}, [2, 3, 5]),
        ({"epoch": 2, "processed_num": 60}, []),
    ],
)
def test_states_of_horovod_are_understood(monkeypatch, state, left):
    (only,) = Ranks(monkeypatch, 1, 6, shuffle=False).samplers
    only.load_state_dict(state)
    assert only.epoch == 2
    assert list(only) == left


def test_a_loader_takes_it(monkeypatch):
    first, second = Ranks(monkeypatch, 2, 10, shuffle=False).samplers
    loaders = [torch.utils.data.DataLoader(torch.arange(10), batch_size=3, sampler=each) for each in (first, second)]
    assert [batch.tolist() for batch in loaders[1]] == [[1, 3, 5], [7, 9]]
    assert len(loaders[0]) == 2


def test_it_needs_ranks():
    hvd.shutdown()
    with pytest.raises(ValueError, match="has not been initialized"):
        ElasticSampler(range(3))
