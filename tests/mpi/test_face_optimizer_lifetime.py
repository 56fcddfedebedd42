"""Several optimizers, optimizers that do not fit, that are dropped, and that outlive `shutdown`."""

from __future__ import annotations

import gc
import weakref

import pytest

torch = pytest.importorskip("torch")

from mpi4py import MPI  # noqa: E402

import mpitrain.torch as hvd  # noqa: E402
from mpitrain.comm import mpi  # noqa: E402
from tests.support.training import (  # noqa: E402
    Net,
    assert_follows,
    initialized,
    loss_of,
    needs_peers,
    pair,
    sgd,
    shard,
    train_both,
)


@pytest.fixture(scope="module", autouse=True)
def _initialized():
    with initialized("64"):
        yield


def test_several_optimizers_whose_passes_come_in_different_order():
    models, references = [Net() for _ in range(3)], [Net() for _ in range(3)]
    optimizers = [hvd.DistributedOptimizer(sgd(model.parameters())) for model in models]
    singles = [sgd(model.parameters()) for model in references]
    for step in range(6):
        order = list(range(3))
        for index in order[hvd.rank() % 3 :] + order[: hvd.rank() % 3]:
            optimizers[index].zero_grad()
            loss_of(models[index], 3 * step + index, shard).backward()
        for optimizer in optimizers:
            optimizer.step()
        for index in order:
            singles[index].zero_grad()
            loss_of(references[index], 3 * step + index).backward()
            singles[index].step()
    for model, reference in zip(models, references, strict=True):
        assert_follows(model, reference)


def test_two_optimizers_over_one_model_and_a_shared_loss():
    model, reference = Net(), Net()

    def split(net):
        return list(net.first.parameters()), [*net.middle.parameters(), *net.last.parameters()]

    optimizers = [hvd.DistributedOptimizer(sgd(params)) for params in split(model)]
    singles = [sgd(params) for params in split(reference)]
    for step in range(4):
        for each in (*optimizers, *singles):
            each.zero_grad()
        loss_of(model, step, shard).backward()
        loss_of(reference, step).backward()
        for each in (*optimizers, *singles):
            each.step()
    assert_follows(model, reference)


@needs_peers
def test_different_parameters_are_an_error_on_every_rank():
    is_odd = hvd.rank() == hvd.size() - 1

    def step_with(count, parameters=1, **options):
        optimizer = hvd.DistributedOptimizer(
            sgd([torch.nn.Parameter(torch.ones(count)) for _ in range(parameters)]), **options
        )
        # The ranks tell one another what they have when they step for the first time.
        optimizer.step()

    with pytest.raises(hvd.HorovodInternalError, match="ranks have different parameters or arguments") as caught:
        step_with(2 + is_odd)
    assert f"rank {hvd.size() - 1}: allreduce.noname.0.0: torch.float32 [3]" in str(caught.value)
    with pytest.raises(hvd.HorovodInternalError, match="rank 0: nothing"):
        step_with(2, parameters=1 + is_odd)
    with pytest.raises(hvd.HorovodInternalError, match="2 backward passes per step"):
        step_with(2, backward_passes_per_step=1 + is_odd)
    with pytest.raises(hvd.HorovodInternalError, match="op='max'"):
        step_with(2, op=hvd.Max if is_odd else hvd.Sum)
    step_with(3)


def test_a_parameter_belongs_to_the_optimizer_that_was_made_last():
    model, earlier, reference, single = pair()
    train_both(model, earlier, reference, single, 0)
    optimizer = hvd.DistributedOptimizer(sgd(model.parameters()))
    single = sgd(reference.parameters())
    for step in (1, 2):
        train_both(model, optimizer, reference, single, step)
    assert_follows(model, reference)
    if hvd.size() > 1:
        with pytest.raises(RuntimeError, match="its parameters were given to another one; wrap the optimizer again"):
            earlier.step()


def test_a_dropped_optimizer_leaves_plain_parameters():
    model, optimizer, _, _ = pair()
    loss_of(model, 0, shard).backward()
    optimizer.step()
    reference = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert reference() is None
    model.zero_grad()
    if hvd.rank() == 0:
        for _ in range(2):
            loss_of(model, 1).backward()
        assert all(parameter.grad is not None for parameter in model.parameters())


@needs_peers
def test_dropped_optimizers_give_back_memory_and_communicators():
    gc.collect()
    reclaimer = hvd.global_process_set.negotiator.group._reclaimer
    before = len(reclaimer)
    gc.disable()  # nothing of an optimizer may be left to it
    try:
        for _ in range(20):
            parameter = torch.nn.Parameter(torch.ones(1000))
            optimizer = hvd.DistributedOptimizer(sgd([parameter]))
            for _ in range(2):
                parameter.sum().backward()
                optimizer.step()
        # This one and its predecessor, which was still there when this one was made: a communicator and memory each.
        assert len(reclaimer) <= before + 4
        views = weakref.WeakSet(slot.view for slot in optimizer._reducer._slots)
        del optimizer, parameter
        assert len(views) == 0
    finally:
        gc.enable()


def test_wrapping_twice_is_refused():
    optimizer = hvd.DistributedOptimizer(sgd([torch.nn.Parameter(torch.ones(1))]))
    with pytest.raises(ValueError, match="optimizer: is distributed already"):
        hvd.DistributedOptimizer(optimizer)


def test_an_optimizer_goes_on_after_shutdown_and_init():
    model, optimizer, reference, single = pair()
    for cycle in range(3):
        for step in range(3):
            train_both(model, optimizer, reference, single, 3 * cycle + step)
        if cycle == 1:
            # Between a backward pass and its step, as when another rank has failed.
            loss_of(model, 0, shard).backward()
        hvd.shutdown()
        hvd.init()
    train_both(model, optimizer, reference, single, 9)
    # The gradients that an optimizer finds count, even if it was not asked to clear them since.
    hvd.shutdown()
    hvd.init()
    model.zero_grad()
    loss_of(model, 10, shard).backward()
    optimizer.step()
    single.zero_grad()
    loss_of(reference, 10).backward()
    single.step()
    assert_follows(model, reference)


@needs_peers
def test_a_process_may_wrap_its_optimizer_while_the_others_are_elsewhere():
    optimizer = None
    if hvd.rank() == 0:
        optimizer = hvd.DistributedOptimizer(sgd(Net().parameters()))
    assert hvd.allreduce(torch.ones(1), op=hvd.Sum).item() == hvd.size()
    if hvd.rank():
        optimizer = hvd.DistributedOptimizer(sgd(Net().parameters()))
    optimizer.step()


@needs_peers
def test_shutdown_and_init_give_back_communicators_and_memory(monkeypatch):
    communicators, blocks = [], weakref.WeakSet()
    duplicate, allocate = mpi._duplicate, mpi.allocate_mapped

    def noted_duplicate(comm):
        communicators.append(duplicate(comm))
        return communicators[-1]

    def noted_block(*arguments):
        block = allocate(*arguments)
        blocks.add(block)
        return block

    monkeypatch.setattr(mpi, "_duplicate", noted_duplicate)
    monkeypatch.setattr(mpi, "allocate_mapped", noted_block)
    model, optimizer, _, _ = pair()
    living = []
    for cycle in range(6):
        for step in range(2):
            optimizer.zero_grad()
            loss_of(model, step, shard).backward()
            optimizer.step()
        members = hvd.add_process_set([0])
        if cycle % 2:
            hvd.remove_process_set(members)
        hvd.allreduce(torch.ones(3))
        hvd.shutdown()
        hvd.init()
        gc.collect()
        living.append((sum(comm != MPI.COMM_NULL for comm in communicators), len(blocks)))
    # What the last worlds have may still be needed, by gradients or by a thread that is about to end; what was before
    # is gone, so numbers come back to what they were.
    for kind in range(2):
        assert min(each[kind] for each in living[3:]) <= min(each[kind] for each in living[1:3]), living
