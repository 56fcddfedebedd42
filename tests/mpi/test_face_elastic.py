"""Elastic training on the ranks of this run: attempts end together, and go on from the last commit."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

import mpitrain.torch as hvd  # noqa: E402
from mpitrain.errors import CommRevokedError  # noqa: E402

NUM_SAMPLES = 24
BATCH_SIZE = 2


@pytest.fixture(autouse=True)
def _initialized():
    hvd.shutdown()
    hvd.init()
    yield
    hvd.shutdown()


class Job:
    """Fits a line to samples of which each rank has its part; every batch is one step, and every other a commit."""

    def __init__(self):
        torch.manual_seed(hvd.rank())
        self.inputs = torch.arange(NUM_SAMPLES * 2.0).reshape(NUM_SAMPLES, 2) / NUM_SAMPLES
        self.targets = self.inputs @ torch.tensor([[1.0], [-2.0]])
        model = torch.nn.Linear(2, 1)
        optimizer = hvd.DistributedOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), named_parameters=model.named_parameters()
        )
        sampler = hvd.elastic.ElasticSampler(self.inputs, seed=7)
        self.state = hvd.elastic.TorchState(model, optimizer, sampler=sampler, epoch=0, losses=[])
        self.seen = []

    def train(self, disturb=lambda steps: None):
        """Return the losses of all ranks' batches; `disturb` is called within each step with the number of steps."""

        @hvd.elastic.run
        def fit(state, num_epochs):
            while state.epoch < num_epochs:
                loader = torch.utils.data.DataLoader(range(NUM_SAMPLES), BATCH_SIZE, sampler=state.sampler)
                for index, batch in enumerate(loader):
                    self.step(state, batch, disturb)
                    state.sampler.record_batch(index, len(batch))
                    if len(state.losses) % 2 == 0:
                        state.commit()
                state.epoch += 1
                state.sampler.set_epoch(state.epoch)
                state.commit()
            return list(state.losses)

        return fit(self.state, num_epochs=2)

    def step(self, state, batch, disturb):
        state.optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(state.model(self.inputs[batch]), self.targets[batch])
        loss.backward()
        # While gradients are on their way.
        disturb(len(state.losses))
        state.optimizer.step()
        state.losses.append(hvd.allreduce(loss.detach(), name="loss").item())


@pytest.fixture(scope="module")
def undisturbed():
    hvd.shutdown()
    hvd.init()
    job = Job()
    return job.train(), job.state


class Disturbance:
    """Raises once, within a step, on some ranks."""

    def __init__(self, error, ranks, step=5):
        self.error, self.step = error, step
        self.is_due = hvd.rank() in ranks
        self.steps = []

    def __call__(self, steps):
        self.steps.append(steps)
        if self.is_due and steps == self.step:
            self.is_due = False
            raise self.error


def last_rank():
    return [hvd.size() - 1]


def all_ranks():
    return range(hvd.size())


def assert_same_parameters(state, reference):
    for one, other in zip(state.model.parameters(), reference.model.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_without_failures_it_is_a_call(undisturbed):
    losses, state = undisturbed
    assert len(losses) == 2 * -(-NUM_SAMPLES // (BATCH_SIZE * hvd.size()))
    assert losses[-1] < losses[0] / 2
    assert state.epoch == 2
    everybodys = hvd.allgather_object([param.tolist() for param in state.model.parameters()])
    assert everybodys == [everybodys[0]] * hvd.size()


@pytest.mark.parametrize("ranks", [last_rank, all_ranks], ids=["last rank", "all ranks"])
def test_after_a_failure_work_goes_on_from_the_last_commit(undisturbed, ranks):
    losses, reference = undisturbed
    job = Job()
    disturbance = Disturbance(hvd.HorovodInternalError("by hand"), ranks())
    # Step 4 was not committed, so it is done once more, on the samples that it had.
    assert job.train(disturbance) == pytest.approx(losses)
    assert disturbance.steps[:8] == [0, 1, 2, 3, 4, 5, 4, 5]
    assert_same_parameters(job.state, reference)


def test_after_an_interrupt_of_all_ranks_the_state_is_kept(undisturbed):
    losses, reference = undisturbed
    job = Job()
    disturbance = Disturbance(hvd.elastic.HostsUpdatedInterrupt(), all_ranks())
    assert job.train(disturbance) == pytest.approx(losses)
    assert disturbance.steps[:7] == [0, 1, 2, 3, 4, 5, 5]
    assert_same_parameters(job.state, reference)


@pytest.mark.parametrize("update", [1, 2], ids=["removed", "added"])
def test_a_notice_to_one_rank_interrupts_all_after_the_same_commit(undisturbed, update):
    losses, _ = undisturbed
    job = Job()
    restarts, syncs = [], []
    job.state.register_reset_callbacks([lambda: restarts.append((hvd.size(), len(job.state.losses)))])
    sync = job.state.sync
    job.state.sync = lambda: syncs.append(len(job.state.losses)) or sync()

    def notify(steps):
        if steps == 3 and not restarts and hvd.rank() == hvd.size() - 1:
            job.state.on_hosts_updated(0.0, update)

    assert job.train(notify) == pytest.approx(losses)
    assert restarts == [(hvd.size(), 4)]
    # Where ranks are only removed, those that stay are equal already.
    assert syncs == ([0] if update == 1 else [0, 4])


def test_ranks_that_have_returned_come_again_for_one_that_has_not():
    calls = []
    state = hvd.elastic.TorchState(value=hvd.rank())

    @hvd.elastic.run
    def work(state):
        calls.append(state.value)
        if hvd.rank() == hvd.size() - 1 and len(calls) == 1:
            raise hvd.HorovodInternalError("after all others have returned")
        return hvd.allreduce(torch.tensor(10.0 + hvd.rank()), op=hvd.Sum).item() if len(calls) == 2 else None

    assert work(state) == sum(10.0 + rank for rank in range(hvd.size()))
    assert calls == [0, 0]


def test_failures_may_come_again_and_in_any_mixture():
    rank, size = hvd.rank(), hvd.size()
    state = hvd.elastic.TorchState(done=0)
    attempts = []

    @hvd.elastic.run
    def work(state):
        attempts.append(state.done)
        number = len(attempts)
        if number == 1 + rank % 3:
            raise hvd.elastic.HostsUpdatedInterrupt(skip_sync=True)
        if number == 4 and rank == 0:
            raise hvd.HorovodInternalError("by hand")
        state.done += int(hvd.allreduce(torch.tensor(1), op=hvd.Sum, name="step"))
        state.commit()
        return state.done

    result = work(state)
    assert hvd.allgather_object(result) == [result] * size
    assert result % size == 0
    assert len(attempts) == {1: 2, 2: 3}.get(size, 5)


@pytest.mark.mpi(min_size=2)
def test_any_other_exception_ends_the_run_on_all_ranks():
    rank, size = hvd.rank(), hvd.size()
    state = hvd.elastic.TorchState(epoch=0)

    @hvd.elastic.run
    def work(state):
        if hvd.rank() == hvd.size() - 1:
            hvd.shutdown()
            raise KeyError("batch 17")
        hvd.allreduce(torch.ones(1), name="of all")

    if rank == size - 1:
        with pytest.raises(KeyError, match="batch 17"):
            work(state)
    else:
        with pytest.raises(CommRevokedError, match=rf"given up by rank {size - 1}: elastic run: KeyError: 'batch 17'"):
            work(state)


def test_it_needs_ranks():
    hvd.shutdown()
    state = hvd.elastic.TorchState(epoch=0)
    with pytest.raises(ValueError, match="has not been initialized"):
        hvd.elastic.run(lambda state: None)(state)
