"""`hvd.join`: epochs of different lengths on different ranks, for operations and for optimizers."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

import mpitrain.torch as hvd  # noqa: E402


@pytest.fixture(autouse=True)
def _initialized():
    hvd.init()
    yield
    hvd.shutdown()


def length_of(rank, epoch=0):
    """Batches of a rank: different on all ranks, and each is sometimes the first and the last to join."""
    return 2 * ((rank + epoch) % hvd.size())


def active(index, epoch=0):
    return [rank for rank in range(hvd.size()) if length_of(rank, epoch) > index]


def join():
    last = hvd.join()
    assert hvd.allgather_object(last) == [last] * hvd.size()
    return last


def test_returns_the_last_rank_on_every_rank():
    assert isinstance(hvd.join(device=0), int)
    if hvd.size() > 1:
        for slow in range(hvd.size()):
            # The others have joined: only they could be left out of this sum.
            while hvd.rank() == slow and hvd.allreduce(torch.ones(()), op=hvd.Sum, name="alone").item() > 1:
                pass
            if hvd.rank() != slow:
                hvd.join()
            else:
                assert hvd.join() == slow
            hvd.barrier()


def test_unnamed_operations_of_every_kind_in_uneven_epochs():
    rank, size = hvd.rank(), hvd.size()
    for epoch in range(3):
        for index in range(length_of(rank, epoch)):
            others = active(index, epoch)
            mine = torch.full((5,), float(rank + 1))
            total = sum(other + 1.0 for other in others)
            assert torch.equal(hvd.allreduce(mine, op=hvd.Sum), torch.full((5,), total))
            torch.testing.assert_close(hvd.allreduce(mine), torch.full((5,), total / size))
            bfloats = hvd.grouped_allreduce([mine.bfloat16(), mine[:1].long()], op=hvd.Sum)
            assert [each.float().unique().item() for each in bfloats] == [total, total]
            assert hvd.allreduce(mine, op=hvd.Min)[0].item() == others[0] + 1
            assert hvd.allreduce(mine, op=hvd.Max)[0].item() == others[-1] + 1
            gathered = hvd.allgather(torch.full((rank + 1, 2), rank, dtype=torch.bfloat16))
            assert gathered[:, 0].tolist() == [other for other in others for _ in range(other + 1)]
            assert hvd.broadcast(mine, others[0])[0].item() == others[0] + 1
            splits = [int(other in others) for other in range(size)]
            received, rows = hvd.alltoall(torch.full((len(others),), rank), splits=splits)
            assert (received.tolist(), rows.tolist()) == (others, splits)
            part = hvd.reducescatter(torch.arange(2.0 * size) * (rank + 1), op=hvd.Sum)
            assert torch.equal(part, torch.arange(2.0 * rank, 2.0 * rank + 2) * total)
            hvd.barrier()
        join()


@pytest.mark.mpi(min_size=2)
def test_operations_that_need_a_rank_that_has_joined_are_errors_on_all_others():
    size, rank = hvd.size(), hvd.rank()
    gone = size - 1
    if rank != gone:
        # Until the last one has joined, the sum says so.
        while hvd.allreduce(torch.ones(()), op=hvd.Sum).item() == size:
            pass
        with pytest.raises(hvd.HorovodInternalError, match=f"rank {gone} has joined, and brings nothing to broadcast"):
            hvd.broadcast(torch.zeros(3), gone)
        with pytest.raises(hvd.HorovodInternalError, match=r"rows to ranks .* which have joined and take none"):
            hvd.alltoall(torch.zeros(size))
        assert hvd.allreduce(torch.ones(2), op=hvd.Sum).tolist() == [size - 1] * 2
    join()
    assert hvd.broadcast(torch.full((2,), float(rank)), gone).tolist() == [gone] * 2


@pytest.mark.mpi(min_size=3)
def test_a_rank_joins_on_all_of_its_process_sets():
    rank = hvd.rank()
    part = hvd.add_process_set([0, 2])
    if rank == 0:
        while hvd.allreduce(torch.ones(()), op=hvd.Sum, process_set=part).item() == 2:
            pass
    elif rank == 2:
        hvd.allreduce(torch.ones(()), op=hvd.Sum, process_set=part)
    join()
    if part.included():
        assert hvd.allreduce(torch.ones(()), op=hvd.Sum, process_set=part).item() == 2
    assert hvd.allreduce(torch.ones(()), op=hvd.Sum).item() == hvd.size()


class Model(torch.nn.Module):
    def __init__(self, sparse=False):
        super().__init__()
        torch.manual_seed(1)
        self.embedding = torch.nn.Embedding(11, 4, sparse=sparse)
        # Several buckets, and a parameter that has no gradient.
        self.layers = torch.nn.Sequential(torch.nn.Linear(4, 300), torch.nn.Tanh(), torch.nn.Linear(300, 1))
        self.unused = torch.nn.Parameter(torch.ones(3))

    def forward(self, rank, index):
        rows = torch.tensor([(rank * 3 + index) % 11, (rank + 5 * index) % 11])
        return torch.tanh(self.layers(self.embedding(rows)) - rank).sum()


def parameters_of(model):
    return torch.cat([param.detach().reshape(-1) for param in model.parameters()])


def trained_alone(size, epochs, passes=1, momentum=0.9):
    """Train as all ranks together should, in this process: the average counts those without data as zeros."""
    model = Model()
    optimizer = sgd(model, momentum)
    for epoch in range(epochs):
        for index in range(0, max(length_of(rank, epoch) for rank in range(size)), passes):
            optimizer.zero_grad()
            for rank in active(index, epoch):
                for each in range(passes):
                    (model(rank, index + each) / size).backward()
            optimizer.step()
    return parameters_of(model)


def sgd(model, momentum=0.9):
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=momentum)


def synchronize_models(model, optimizer, last):
    hvd.broadcast_parameters(model.state_dict(), last)
    hvd.broadcast_optimizer_state(optimizer, last)


@pytest.mark.parametrize("kind", ["dense", "sparse", "passes", "tiny buckets"])
def test_optimizer_in_uneven_epochs_is_one_process_with_all_batches(kind, monkeypatch):
    if kind == "tiny buckets":
        hvd.shutdown()
        monkeypatch.setenv("MPITRAIN_BUCKET_NBYTES", "1000")
        hvd.init()
    passes = 2 if kind == "passes" else 1
    momentum = 0.0 if kind == "sparse" else 0.9
    model = Model(sparse=kind == "sparse")
    optimizer = hvd.DistributedOptimizer(
        sgd(model, momentum), named_parameters=model.named_parameters(), backward_passes_per_step=passes
    )
    for epoch in range(3):
        # Some ranks join before they have ever made a step.
        for index in range(0, length_of(hvd.rank(), epoch), passes):
            optimizer.zero_grad()
            for each in range(passes):
                model(hvd.rank(), index + each).backward()
            optimizer.step()
        before = parameters_of(model)
        grads = [None if param.grad is None else param.grad.clone() for param in model.parameters()]
        last = join()
        # Who has joined keeps what it had.
        assert torch.equal(parameters_of(model), before)
        for param, grad in zip(model.parameters(), grads, strict=True):
            assert (param.grad is None) == (grad is None)
            assert grad is None or torch.equal(param.grad.to_dense(), grad.to_dense())
        # All ranks that made the last step have the same parameters, and the last one to join is among these.
        synchronize_models(model, optimizer, last)
    expected = trained_alone(hvd.size(), 3, passes, momentum)
    torch.testing.assert_close(parameters_of(model), expected, rtol=1e-4, atol=1e-5)


def test_two_optimizers_and_metrics_in_one_loop():
    first, second = Model(), Model()
    optimizers = [hvd.DistributedOptimizer(sgd(model)) for model in (first, second)]
    for epoch in range(2):
        for index in range(length_of(hvd.rank(), epoch)):
            for optimizer in optimizers:
                optimizer.zero_grad()
            # Both backward passes are in flight before the first step.
            losses = [model(hvd.rank(), index) for model in (first, second)]
            for loss in losses:
                loss.backward()
            for optimizer in optimizers[:: 1 if index % 2 else -1]:
                optimizer.step()
            weight = hvd.allreduce(torch.ones(()), name="weight", op=hvd.Sum)
            assert weight.item() == len(active(index, epoch))
        last = join()
        for model, optimizer in zip((first, second), optimizers, strict=True):
            synchronize_models(model, optimizer, last)
    expected = trained_alone(hvd.size(), 2)
    for model in (first, second):
        torch.testing.assert_close(parameters_of(model), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.mpi(min_size=2)
def test_gradients_that_nobody_has_stepped_with_are_reduced_before():
    model = Model()
    optimizer = hvd.DistributedOptimizer(sgd(model))
    for index in range(2):
        optimizer.zero_grad()
        model(hvd.rank(), index).backward()
        if index == 0 or hvd.rank() == 0:
            optimizer.step()
    join()
    grads = torch.cat([param.grad.reshape(-1) for param in model.parameters()])
    assert torch.equal(grads, hvd.broadcast(grads, 0))


@pytest.mark.mpi(min_size=2)
def test_parameters_cannot_be_added_while_a_rank_has_joined():
    model = Model()
    optimizer = hvd.DistributedOptimizer(sgd(model))
    if hvd.rank() > 0:
        model(hvd.rank(), 0).backward()
        optimizer.step()
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})
        with pytest.raises(RuntimeError, match=r"cannot take on parameters while ranks \[0.* have joined; add or"):
            optimizer.step()
    join()
