"""What a state keeps, on one rank."""

from __future__ import annotations

import copy

import pytest

torch = pytest.importorskip("torch")

import mpitrain.torch as hvd  # noqa: E402
from mpitrain.torch.elastic import ElasticSampler, HostsUpdatedInterrupt, ObjectState, State, TorchState  # noqa: E402


@pytest.fixture(scope="module", autouse=True)
def _initialized():
    hvd.init()
    yield
    hvd.shutdown()


def step(model, optimizer):
    optimizer.zero_grad()
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()


def test_a_training_job_goes_back_to_the_last_commit_as_often_as_needed():
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3, momentum=0.5), torch.nn.Linear(3, 1))
    model[1].eval()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    sampler = ElasticSampler(range(10), shuffle=False)
    losses = [3.0]
    state = TorchState(model, optimizer, scheduler=scheduler, sampler=sampler, losses=losses, epoch=0)
    step(model, optimizer)
    state.epoch = 1
    state.losses.append(2.0)
    sampler.record_batch(0, 4)
    scheduler.step()
    state.commit()
    saved = copy.deepcopy([model.state_dict(), optimizer.state_dict(), scheduler.state_dict()])
    for _ in range(2):
        step(model, optimizer)
        scheduler.step()
        sampler.record_batch(1, 4)
        state.epoch = 2
        state.losses.append(1.0)
        state.restore()
        for one, other in zip(saved[0].values(), model.state_dict().values(), strict=True):
            assert torch.equal(one, other)
        assert repr(optimizer.state_dict()) == repr(saved[1])
        assert scheduler.state_dict() == saved[2]
        assert (state.epoch, state.losses, sampler.processed_num) == (1, [3.0, 2.0], 4)
    # Everything is the object that it was, and only what cannot take a state was replaced.
    assert state.model is model
    assert state.scheduler is scheduler
    assert state.losses is not losses


def test_before_the_first_commit_the_state_is_that_of_the_beginning():
    state = TorchState(epoch=3, table={"a": [1]})
    assert (state.model, state.optimizer) == (None, None)
    state.table["a"].append(2)
    state.epoch = 4
    state.restore()
    assert (state.epoch, state.table) == (3, {"a": [1]})


def test_what_is_synchronized_is_what_is_there_now_and_is_saved():
    state = TorchState(epoch=0)
    state.epoch = 5
    state.sync()
    state.epoch = 6
    state.restore()
    assert state.epoch == 5


@pytest.mark.parametrize(
    ("notices", "skip_sync"), [([()], False), ([(1,), (1,)], True), ([(2,)], False), ([(1,), (2,)], False)]
)
def test_notices_interrupt_once(notices, skip_sync):
    state = TorchState(epoch=0)
    state.check_host_updates()
    for notice in notices:
        state.on_hosts_updated(0.0, *notice)
    state.epoch = 1
    with pytest.raises(HostsUpdatedInterrupt) as caught:
        state.commit()
    assert caught.value.skip_sync == skip_sync
    state.commit()
    state.epoch = 2
    state.restore()
    assert state.epoch == 1
    state.on_hosts_updated(0.0)
    state.on_reset()
    state.check_host_updates()


def test_callbacks_come_in_their_order_and_after_the_samplers():
    calls = []
    sampler = ElasticSampler(range(6), shuffle=False)
    state = TorchState(sampler=sampler)
    state.register_reset_callbacks([lambda: calls.append(list(sampler)), lambda: calls.append("second")])
    state.register_reset_callbacks([lambda: calls.append("third")])
    sampler.record_batch(0, 4)
    state.on_reset()
    assert calls == [[4, 5], "second", "third"]


def test_names_of_methods_are_refused():
    with pytest.raises(ValueError, match="an attribute cannot have the name of a method, got commit, sync; rename"):
        ObjectState(lambda value: value, lambda: 0, sync=3, commit=1, epoch=0)


def test_a_state_of_ones_own():
    class Own(State):
        def save(self):
            self.saved = self.value

        def restore(self):
            self.value = self.saved

        def sync(self):
            self.value = self._bcast_object(self.value)

    state = Own(bcast_object=hvd.broadcast_object, get_rank=hvd.rank)
    state.value = 3
    state.commit()
    state.value = 4
    state.restore()
    state.sync()
    assert state.value == 3
    with pytest.raises(NotImplementedError):
        State(hvd.broadcast_object, hvd.rank).save()
