"""`DistributedOptimizer` in training loops: clipping, closures, scalers, schedulers, saved states, failures."""

from __future__ import annotations

import contextlib
import copy
import io

import pytest

torch = pytest.importorskip("torch")

import mpitrain.torch as hvd  # noqa: E402
from tests.support.training import (  # noqa: E402
    OPTIMIZERS,
    Net,
    assert_follows,
    assert_same_bits,
    batch,
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


def test_clipping_between_synchronize_and_step():
    model, optimizer, reference, single = pair()
    for step in range(6):
        optimizer.zero_grad()
        loss_of(model, step, shard).backward()
        optimizer.synchronize()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        with optimizer.skip_synchronize():
            optimizer.step()
        single.zero_grad()
        loss_of(reference, step).backward()
        expected = torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.05)
        single.step()
        torch.testing.assert_close(norm, expected, rtol=1e-5, atol=1e-6)
    assert_follows(model, reference)


@needs_peers
def test_step_after_synchronize_warns_once():
    model, optimizer, _, _ = pair()
    loss_of(model, 0, shard).backward()
    optimizer.synchronize()
    with pytest.warns(UserWarning, match="called without optimizer.skip_synchronize") as caught:
        optimizer.step()
    assert len(caught) == 1
    assert_same_bits(model)
    optimizer.zero_grad()
    loss_of(model, 1, shard).backward()
    optimizer.step()
    assert_same_bits(model)


@needs_peers
def test_zero_grad_between_backward_and_step_is_refused():
    model, optimizer, reference, single = pair()
    loss_of(model, 0, shard).backward()
    for set_to_none in (True, False):
        with pytest.raises(AssertionError, match=r"zero_grad\(\) was called after loss.backward\(\) but before"):
            optimizer.zero_grad(set_to_none)
    optimizer.step()
    loss_of(reference, 0).backward()
    single.step()
    assert_follows(model, reference)
    loss_of(model, 1, shard)
    optimizer.synchronize()
    optimizer.zero_grad()


def test_closures():
    model, reference = Net(), Net()
    optimizer = hvd.DistributedOptimizer(torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=4))
    single = torch.optim.LBFGS(reference.parameters(), lr=0.5, max_iter=4)
    losses = {}

    def closure(net, each, take):
        def evaluate():
            each.zero_grad()
            loss = loss_of(net, 0, take)
            loss.backward()
            # The average is what all ranks decide by.
            return hvd.allreduce(loss.detach()) if take is shard else loss.detach()

        return evaluate

    for _ in range(3):
        losses["mine"] = float(optimizer.step(closure(model, optimizer, shard)))
        losses["theirs"] = float(single.step(closure(reference, single, lambda tensor: tensor)))
    assert losses["mine"] == pytest.approx(losses["theirs"], abs=1e-4)
    assert_follows(model, reference, 1e-3)


def test_closure_of_sgd_returns_the_loss_and_averages():
    model, optimizer, reference, single = pair()

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model, 0, shard)
        loss.backward()
        return loss

    for step in range(3):
        loss = optimizer.step(closure)
        assert step or loss.item() == pytest.approx(loss_of(Net(), 0, shard).item())
        single.zero_grad()
        loss_of(reference, 0).backward()
        single.step()
    assert_follows(model, reference)


def test_grad_scaler():
    model, optimizer, reference, single = pair()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(5):
        optimizer.zero_grad()
        scaler.scale(loss_of(model, step, shard)).backward()
        optimizer.synchronize()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1e3)
        with optimizer.skip_synchronize():
            scaler.step(optimizer)
        scaler.update()
        single.zero_grad()
        loss_of(reference, step).backward()
        single.step()
    assert_follows(model, reference)


def test_grad_scaler_skips_a_step_on_all_ranks_when_one_overflows():
    model, optimizer, _, _ = pair()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    before = copy.deepcopy(model)
    for step, is_bad in enumerate((True, False)):
        optimizer.zero_grad()
        factor = float("inf") if is_bad and hvd.rank() == 0 else 1.0
        scaler.scale(loss_of(model, step, shard) * factor).backward()
        optimizer.synchronize()
        with optimizer.skip_synchronize():
            scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == 512.0
        is_unchanged = all(map(torch.equal, model.parameters(), before.parameters()))
        assert is_unchanged == is_bad
    assert_same_bits(model)


def test_named_operations_run_beside_the_gradients():
    model, optimizer, reference, single = pair()
    for step in range(4):
        handles = {}
        names = [f"metric {index}" for index in range(4)]
        for name in names if hvd.rank() % 2 else reversed(names):
            handles[name] = hvd.allreduce_async(torch.ones(3), name=name, op=hvd.Sum)
        train_both(model, optimizer, reference, single, step)
        assert all(hvd.synchronize(handle).tolist() == [hvd.size()] * 3 for handle in handles.values())
    assert_follows(model, reference)


@pytest.mark.parametrize("order", ["scheduler first", "optimizer first"])
def test_learning_rate_schedulers(order):
    model, reference = Net(), Net()
    inner = sgd(model.parameters())
    if order == "scheduler first":
        scheduler = torch.optim.lr_scheduler.StepLR(inner, 2, gamma=0.5)
        optimizer = hvd.DistributedOptimizer(inner)
    else:
        optimizer = hvd.DistributedOptimizer(inner)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)
    single = sgd(reference.parameters())
    single_scheduler = torch.optim.lr_scheduler.StepLR(single, 2, gamma=0.5)
    quiet = (
        pytest.warns(UserWarning, match="before `optimizer.step")
        if order == "scheduler first"
        else contextlib.nullcontext()
    )
    with quiet:
        for step in range(6):
            train_both(model, optimizer, reference, single, step)
            scheduler.step()
            single_scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * 0.5**3)
    assert_follows(model, reference)


def test_state_is_kept_saved_and_loaded():
    model, reference = Net(), Net()
    inner, single = (OPTIMIZERS["adam"](net.parameters()) for net in (model, reference))
    for net, each in ((model, inner), (reference, single)):
        loss_of(net, 0).backward()
        each.step()
    optimizer = hvd.DistributedOptimizer(inner)
    assert optimizer.state[model.first.weight]["step"] == 1
    for step in (1, 2):
        train_both(model, optimizer, reference, single, step)
    stored = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, stored)
    stored.seek(0)
    saved = torch.load(stored, weights_only=True)
    again = Net()
    again.load_state_dict(saved["model"])
    resumed = hvd.DistributedOptimizer(OPTIMIZERS["adam"](again.parameters()))
    resumed.load_state_dict(saved["optimizer"])
    for step in (3, 4):
        train_both(again, resumed, reference, single, step)
    assert_follows(again, reference)
    # The state is a plain one.
    OPTIMIZERS["adam"](Net().parameters()).load_state_dict(saved["optimizer"])


def test_it_is_an_optimizer_of_the_original_class():
    parameter = torch.nn.Parameter(torch.ones(2))
    inner = torch.optim.Adam([parameter], lr=0.5, betas=(0.5, 0.6))
    optimizer = hvd.DistributedOptimizer(inner)
    assert isinstance(optimizer, torch.optim.Adam)
    assert type(optimizer).__name__ == "Adam"
    assert optimizer.defaults == inner.defaults
    assert optimizer.param_groups[0]["betas"] == (0.5, 0.6)
    assert "Adam" in repr(optimizer)


@pytest.mark.parametrize("is_loaded", [False, True])
def test_hooks_of_a_step_are_called_once(is_loaded):
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = hvd.DistributedOptimizer(sgd([parameter]))
    if is_loaded:
        optimizer.load_state_dict(optimizer.state_dict())
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append(parameter.grad.tolist()))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    (parameter.sum() * (hvd.rank() + 1)).backward()
    optimizer.step()
    # The gradients are averages by then.
    assert calls == [[(hvd.size() + 1) / 2] * 2, "after"]


def test_model_is_copied_and_pickled_as_ever():
    model, optimizer, reference, single = pair()
    train_both(model, optimizer, reference, single, 0)
    twin = copy.deepcopy(model)
    stored = io.BytesIO()
    torch.save(model, stored)
    stored.seek(0)
    loaded = torch.load(stored, weights_only=False)
    for other in (twin, loaded):
        assert all(map(torch.equal, model.parameters(), other.parameters()))
        # The copy is not distributed: nobody waits for its gradients.
        if hvd.rank() == 0:
            loss_of(other, 1).backward()
            assert all(parameter.grad is not None for parameter in other.parameters())
    train_both(model, optimizer, reference, single, 1)
    assert_follows(model, reference)


class Failing(torch.autograd.Function):
    @staticmethod
    def forward(ctx, inputs):
        return inputs.clone()

    @staticmethod
    def backward(ctx, grad):
        raise ArithmeticError("in the middle of the backward pass")


def fail_in_the_middle(model, step):
    inputs, _ = batch(step)
    hidden = Failing.apply(torch.tanh(model.first(shard(inputs))))
    model.last(torch.tanh(model.middle(hidden))).sum().backward()


@pytest.mark.parametrize("who", ["all", "one"])
def test_training_goes_on_after_an_exception_in_the_backward_pass(who):
    model, optimizer, reference, single = pair()
    train_both(model, optimizer, reference, single, 0)
    optimizer.zero_grad()
    if who == "all" or hvd.rank() == hvd.size() - 1:
        with pytest.raises(ArithmeticError):
            fail_in_the_middle(model, 1)
    else:
        loss_of(model, 1, shard).backward()
    # Every rank drops the step: synchronize ends what is under way.
    optimizer.synchronize()
    optimizer.zero_grad()
    for step in (2, 3):
        train_both(model, optimizer, reference, single, step)
    assert_follows(model, reference)
