"""`DistributedOptimizer`: ranks with shards of the batch follow one process with the whole batch."""

from __future__ import annotations

import itertools

import pytest

torch = pytest.importorskip("torch")

import mpitrain.torch as hvd  # noqa: E402
from tests.support.training import (  # noqa: E402
    OPTIMIZERS,
    ROWS,
    Net,
    assert_follows,
    batch,
    initialized,
    loss_of,
    needs_peers,
    pair,
    sgd,
    shard,
    train_both,
)


@pytest.fixture(scope="module", params=[None, "64"], ids=["default", "tiny"], autouse=True)
def _initialized(request):
    with initialized(request.param):
        yield


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_shards_follow_the_whole_batch(kind):
    model, optimizer, reference, single = pair(OPTIMIZERS[kind])
    for step in range(50):
        optimizer.zero_grad()
        loss = loss_of(model, step, shard)
        loss.backward()
        optimizer.step()
        single.zero_grad()
        whole = loss_of(reference, step)
        whole.backward()
        single.step()
        assert hvd.allreduce(loss.detach()).item() == pytest.approx(whole.item(), abs=1e-4)
    assert_follows(model, reference, 1e-4)


@pytest.mark.parametrize("clearing", ["to none", "to zero", "model", "never"])
def test_gradients_are_cleared_in_every_way(clearing):
    model, optimizer, reference, single = pair()
    clear = {
        "to none": lambda each, _net: each.zero_grad(set_to_none=True),
        "to zero": lambda each, _net: each.zero_grad(set_to_none=False),
        "model": lambda _each, net: net.zero_grad(),
        "never": lambda _each, _net: None,
    }[clearing]
    for step in range(12):
        clear(optimizer, model)
        loss_of(model, step, shard).backward()
        optimizer.step()
        clear(single, reference)
        loss_of(reference, step).backward()
        single.step()
    for mine, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-5)
    assert_follows(model, reference, 1e-4)


@pytest.mark.parametrize("passes", [2, 3])
def test_gradients_of_several_passes_are_summed(passes):
    model, optimizer, reference, single = pair(backward_passes_per_step=passes)
    for step in range(6):
        optimizer.zero_grad()
        single.zero_grad()
        for part in range(passes):
            loss_of(model, 10 * step + part, shard).backward()
            loss_of(reference, 10 * step + part).backward()
        optimizer.step()
        single.step()
    assert_follows(model, reference)


def test_number_of_passes_may_change_between_steps():
    model, optimizer, reference, single = pair()
    for step, passes in enumerate((1, 3, 2)):
        optimizer.set_backward_passes_per_step(passes)
        optimizer.zero_grad()
        single.zero_grad()
        for part in range(passes):
            loss_of(model, 10 * step + part, shard).backward()
            loss_of(reference, 10 * step + part).backward()
        optimizer.step()
        single.step()
    assert_follows(model, reference)


@needs_peers
def test_too_many_passes_are_refused_and_the_step_goes_on():
    model, optimizer, reference, single = pair()
    loss_of(model, 0, shard).backward()
    with pytest.raises(AssertionError, match="more than backward_passes_per_step times before call to step"):
        loss_of(model, 1, shard).backward()
    optimizer.step()
    loss_of(reference, 0).backward()
    single.step()
    assert_follows(model, reference)
    for step in (2, 3):
        optimizer.zero_grad()
        single.zero_grad()
        loss_of(model, step, shard).backward()
        loss_of(reference, step).backward()
        optimizer.step()
        single.step()
    assert_follows(model, reference)


def test_fewer_passes_than_declared_step_with_what_there_is():
    model, optimizer, reference, single = pair(backward_passes_per_step=4)
    loss_of(model, 0, shard).backward()
    loss_of(reference, 0).backward()
    optimizer.step()
    single.step()
    assert_follows(model, reference)


class Branches(torch.nn.Module):
    def __init__(self, count=4):
        super().__init__()
        torch.manual_seed(2)
        self.branches = torch.nn.ModuleList(torch.nn.Linear(6, 3) for _ in range(count))
        self.unused = torch.nn.Linear(4, 4)

    def forward(self, inputs, chosen):
        return sum(self.branches[index](inputs) for index in chosen)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_parameters_that_only_some_ranks_use(momentum):
    model, reference = Branches(), Branches()
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1, momentum=momentum))
    single = torch.optim.SGD(reference.parameters(), lr=0.1, momentum=momentum)
    for step in range(12):
        # Others in each step, on each rank; in some steps none at all.
        chosen_by = [[(rank + step) % 4, (step // 2) % 4] if (rank + step) % 5 else [] for rank in range(hvd.size())]
        optimizer.zero_grad()
        single.zero_grad(set_to_none=False)
        inputs, targets = batch(step)
        for rank, chosen in enumerate(chosen_by):
            if chosen:
                rows = slice(rank, None, hvd.size())
                (torch.nn.functional.mse_loss(reference(inputs[rows], chosen), targets[rows]) / hvd.size()).backward()
        for parameter in reference.parameters():
            # Who did not use a parameter takes part with zeros.
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        single.step()
        mine = chosen_by[hvd.rank()]
        if mine:
            torch.nn.functional.mse_loss(model(shard(inputs), mine), shard(targets)).backward()
        optimizer.step()
    if hvd.size() > 1:
        assert all(parameter.grad is not None for parameter in model.parameters())
        assert_follows(model, reference)


class Mixed(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
        weights = [torch.randn(4 + index, dtype=dtypes[index % 4]) for index in range(8)]
        self.weights = torch.nn.ParameterList(weights)
        self.scalar = torch.nn.Parameter(torch.tensor(0.5))
        self.nothing = torch.nn.Parameter(torch.empty(0, 3))
        self.complex = torch.nn.Parameter(torch.randn(3, dtype=torch.complex64))

    def forward(self, scale):
        total = sum((weight.to(torch.float64) ** 2).sum() for weight in self.weights)
        rest = self.scalar**2 + self.nothing.sum() + self.complex.abs().square().sum()
        return scale * (total + rest)


def test_parameters_of_several_dtypes_and_no_dimensions_or_elements():
    model, reference = Mixed(), Mixed()
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.01))
    single = torch.optim.SGD(reference.parameters(), lr=0.01)
    mean = (hvd.size() + 1) / 2
    for _ in range(4):
        optimizer.zero_grad()
        model(hvd.rank() + 1.0).backward()
        optimizer.step()
        single.zero_grad()
        reference(mean).backward()
        single.step()
    for mine, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        tolerance = 0.03 if mine.dtype in (torch.bfloat16, torch.float16) else 1e-6
        assert mine.grad.dtype == mine.dtype
        assert mine.grad.shape == mine.shape
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)
    assert_same_bits_complex(model)


def assert_same_bits_complex(model):
    mine = [
        torch.view_as_real(p.detach()).tolist() if p.is_complex() else p.detach().tolist() for p in model.parameters()
    ]
    assert all(theirs == mine for theirs in hvd.allgather_object(mine))


def test_frozen_parameters_are_left_alone():
    model, reference = Net(), Net()
    for net in (model, reference):
        net.first.requires_grad_(False)
    optimizer = hvd.DistributedOptimizer(sgd(model.parameters()), named_parameters=model.named_parameters())
    single = sgd(reference.parameters())
    for step in range(4):
        train_both(model, optimizer, reference, single, step)
    assert model.first.weight.grad is None
    assert_follows(model, reference)


def test_parameters_that_are_unfrozen_later_are_averaged():
    model, reference = Net(), Net()
    for net in (model, reference):
        net.first.requires_grad_(False)
        net.middle.requires_grad_(False)
    optimizer = hvd.DistributedOptimizer(sgd(model.parameters()))
    single = sgd(reference.parameters())
    for step in range(9):
        if step in (3, 6):
            for net in (model, reference):
                (net.middle if step == 3 else net.first).requires_grad_(True)
        train_both(model, optimizer, reference, single, step)
        assert_follows(model, reference)


def test_parameters_that_are_frozen_later_stay_as_they_are():
    model, optimizer, reference, single = pair()
    for step in range(8):
        if step == 3:
            for net in (model, reference):
                net.first.requires_grad_(False)
        if step == 6:
            for net in (model, reference):
                net.first.requires_grad_(True)
        train_both(model, optimizer, reference, single, step)
    assert_follows(model, reference)


def test_parameter_groups_that_are_added_later_are_averaged():
    model, reference = Net(), Net()
    optimizer = hvd.DistributedOptimizer(sgd(model.last.parameters()))
    single = sgd(reference.last.parameters())
    for step in range(6):
        if step == 2:
            optimizer.add_param_group({"params": model.first.parameters(), "lr": 0.05})
            single.add_param_group({"params": reference.first.parameters(), "lr": 0.05})
        # Of what nobody steps with, the gradients add up.
        model.middle.zero_grad()
        train_both(model, optimizer, reference, single, step)
        assert_follows(model, reference)


def test_buckets_follow_the_order_of_the_backward_pass():
    class Crossed(torch.nn.Module):
        """Used in another order than registered."""

        def __init__(self):
            super().__init__()
            torch.manual_seed(6)
            self.layers = torch.nn.ModuleList(torch.nn.Linear(6, 6) for _ in range(6))

        def forward(self, inputs):
            for index in (3, 0, 5, 1, 4, 2):
                inputs = torch.tanh(self.layers[index](inputs))
            return inputs[:, :3]

    model, reference = Crossed(), Crossed()
    optimizer = hvd.DistributedOptimizer(sgd(model.parameters()))
    single = sgd(reference.parameters())
    # A step without any gradient teaches nothing.
    optimizer.step()
    for parameter in model.parameters():
        parameter.grad = None
    optimizer.state.clear()
    for step in range(4):
        train_both(model, optimizer, reference, single, step)
    assert_follows(model, reference)
    if hvd.size() > 1:
        first = [index // 2 for index in optimizer._reducer._order[::2]]
        assert first == [2, 4, 1, 5, 0, 3]
        assert all(order == optimizer._reducer._order for order in hvd.allgather_object(optimizer._reducer._order))


def test_shared_and_parametrized_weights():
    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(4)
            self.first = torch.nn.Linear(6, 6)
            self.second = torch.nn.Linear(6, 6)
            self.second.weight = self.first.weight
            self.last = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(6, 3))

        def forward(self, inputs):
            return self.last(torch.tanh(self.second(torch.tanh(self.first(inputs)))))

    model, reference = Tied(), Tied()
    optimizer = hvd.DistributedOptimizer(sgd(model.parameters()), named_parameters=model.named_parameters())
    single = sgd(reference.parameters())
    for step in range(4):
        train_both(model, optimizer, reference, single, step)
    assert model.second.weight is model.first.weight
    assert_follows(model, reference)


def test_convolutions_in_channels_last():
    def make():
        torch.manual_seed(5)
        layers = torch.nn.Conv2d(3, 4, 3), torch.nn.Conv2d(4, 2, 1), torch.nn.Flatten(), torch.nn.Linear(8, 3)
        return torch.nn.Sequential(*layers).to(memory_format=torch.channels_last)

    model, reference = make(), make()
    assert not model[0].weight.is_contiguous()
    optimizer = hvd.DistributedOptimizer(sgd(model.parameters()))
    single = sgd(reference.parameters())
    images = torch.randn(ROWS, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    for _ in range(4):
        for net, each, take in ((model, optimizer, shard), (reference, single, lambda tensor: tensor)):
            each.zero_grad()
            net(take(images)).square().mean().backward()
            each.step()
    assert_follows(model, reference)


def test_evaluation_and_gradients_by_hand_between_steps():
    model, optimizer, reference, single = pair()
    for step in range(3):
        with torch.no_grad():
            loss_of(model, step)
        # On one rank only, and without touching any .grad.
        if hvd.rank() == 0:
            torch.autograd.grad(loss_of(model, step), list(model.parameters()), create_graph=True)
        train_both(model, optimizer, reference, single, step)
    assert_follows(model, reference)


@pytest.mark.filterwarnings("ignore:Using backward")
def test_a_graph_of_gradients():
    model, optimizer, reference, single = pair()
    for net, each, take in ((model, optimizer, shard), (reference, single, lambda tensor: tensor)):
        loss = loss_of(net, 0, take)
        loss.backward(create_graph=True)
        each.step()
    assert not any(parameter.grad.requires_grad for parameter in model.parameters()) or hvd.size() == 1
    assert_follows(model, reference)
    for net in (model, reference):
        net.zero_grad()


def test_a_graph_that_is_used_twice():
    model, optimizer, reference, single = pair(backward_passes_per_step=2)
    for net, each, take in ((model, optimizer, shard), (reference, single, lambda tensor: tensor)):
        loss = loss_of(net, 0, take)
        loss.backward(retain_graph=True)
        loss.backward()
        each.step()
    assert_follows(model, reference)


def test_hooks_of_the_user_see_the_gradients_of_this_rank():
    model, optimizer, _, _ = pair()
    seen = {"tensor": [], "before": []}
    parameter = model.last.bias
    parameter.register_hook(lambda grad: seen["tensor"].append(grad.clone()))
    loss_of(model, 0, shard).backward()
    optimizer.step()
    alone = Net()
    loss_of(alone, 0, shard).backward()
    torch.testing.assert_close(seen["tensor"][0], alone.last.bias.grad)


def test_gradients_are_those_of_the_ranks_averaged():
    model, optimizer, _, _ = pair()
    alone = Net()
    loss_of(alone, 0, shard).backward()
    loss_of(model, 0, shard).backward()
    optimizer.synchronize()
    for mine, own in itertools.zip_longest(model.parameters(), alone.parameters()):
        torch.testing.assert_close(mine.grad, hvd.allreduce(own.grad), rtol=1e-6, atol=1e-7)


@needs_peers
def test_gradients_are_tensors_while_they_are_reduced():
    model, optimizer, reference, single = pair()
    for step in range(3):
        optimizer.zero_grad()
        loss_of(model, step, shard).backward()
        assert all(parameter.grad.shape == parameter.shape for parameter in model.parameters())
        in_flight = [parameter.grad for parameter in model.parameters()]
        optimizer.step()
        # What was asked for early is what the optimizer steps with, once the buckets are laid out.
        assert step == 0 or all(early is late.grad for early, late in zip(in_flight, model.parameters(), strict=True))
        single.zero_grad()
        loss_of(reference, step).backward()
        single.step()
    assert_follows(model, reference)


@needs_peers
def test_gradients_that_are_changed_while_they_are_reduced():
    model, optimizer, _, _ = pair()
    loss_of(model, 0, shard).backward()
    optimizer.step()
    optimizer.zero_grad()
    loss_of(model, 1, shard).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    with pytest.warns(UserWarning, match="Gradients were changed while they were being reduced"):
        optimizer.step()
