"""`DistributedOptimizer`: ranks with shards of the batch follow one process with the whole batch."""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import itertools
import os
import weakref

import pytest

torch = pytest.importorskip("torch")

import mpitrain.torch as hvd  # noqa: E402

pytestmark = pytest.mark.timeout(60)

# Parameters of the test models lie in several buckets with the second of these, in one or two with the first.
BUCKETS = {"default": None, "tiny": "64"}
ROWS = 12  # divides by 1, 2, 3 and 4 ranks


@pytest.fixture(scope="module", params=BUCKETS, autouse=True)
def _initialized(request):
    limits = {f"MPITRAIN_{name}_NBYTES": BUCKETS[request.param] for name in ("BUCKET", "FIRST_BUCKET")}
    os.environ.update({name: limit for name, limit in limits.items() if limit})
    hvd.init()
    yield
    hvd.shutdown()
    for name in limits:
        os.environ.pop(name, None)


needs_peers = pytest.mark.mpi(min_size=2)


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.first = torch.nn.Linear(6, 16)
        self.middle = torch.nn.Linear(16, 16)
        self.last = torch.nn.Linear(16, 3)

    def forward(self, inputs):
        return self.last(torch.tanh(self.middle(torch.tanh(self.first(inputs)))))


def batch(step, rows=ROWS):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(rows, 6, generator=generator), torch.randn(rows, 3, generator=generator)


def shard(tensor):
    return tensor[hvd.rank() :: hvd.size()]


def loss_of(model, step, take=lambda tensor: tensor):
    inputs, targets = batch(step)
    return torch.nn.functional.mse_loss(model(take(inputs)), take(targets))


def assert_follows(model, reference, tolerance=1e-5):
    for (name, mine), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance, msg=lambda text: f"{name}: {text}")  # noqa: B023
    assert_same_bits(model)


def assert_same_bits(model):
    mine = [parameter.detach().to(torch.float64).tolist() for parameter in model.parameters()]
    assert all(theirs == mine for theirs in hvd.allgather_object(mine))


OPTIMIZERS = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=1e-3),
    "adam": lambda params: torch.optim.Adam(params, lr=1e-2),
    "adamw, not foreach": lambda params: torch.optim.AdamW(params, lr=1e-2, foreach=False),
}


def sgd(params, lr=0.1):
    return torch.optim.SGD(params, lr=lr, momentum=0.9)


def pair(make=sgd, **options):
    """A model whose optimizer is distributed, and its twin in one process."""
    model, reference = Net(), Net()
    optimizer = hvd.DistributedOptimizer(make(model.parameters()), **options)
    return model, optimizer, reference, make(reference.parameters())


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


def train_both(model, optimizer, reference, single, step):
    optimizer.zero_grad()
    loss_of(model, step, shard).backward()
    optimizer.step()
    single.zero_grad()
    loss_of(reference, step).backward()
    single.step()


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


@pytest.mark.parametrize("compression", ["none", "fp16", "bf16"])
def test_compression(compression):
    tolerance = {"none": 1e-6, "fp16": 2e-3, "bf16": 2e-2}[compression]
    model, optimizer, reference, single = pair(compression=getattr(hvd.Compression, compression))
    for step in range(4):
        train_both(model, optimizer, reference, single, step)
        assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters())
    assert_follows(model, reference, tolerance)
    if compression != "none" and hvd.size() > 1:
        assert not all(map(torch.equal, model.parameters(), reference.parameters()))


@pytest.mark.parametrize("factor", [1.0, 2.0, 8.0])
def test_predivided_averages(factor):
    model, optimizer, reference, single = pair(gradient_predivide_factor=factor)
    for step in range(4):
        train_both(model, optimizer, reference, single, step)
    assert_follows(model, reference)


@pytest.mark.parametrize(
    ("op", "expected"),
    [
        (hvd.Sum, lambda n: n * (n + 1) / 2),
        (hvd.Min, lambda n: 1.0),
        (hvd.Max, lambda n: n),
        (hvd.Average, lambda n: (n + 1) / 2),
    ],
)
def test_reductions(op, expected):
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = hvd.DistributedOptimizer(sgd([parameter]), op=op)
    (parameter.sum() * (hvd.rank() + 1)).backward()
    optimizer.synchronize()
    assert parameter.grad.tolist() == [expected(hvd.size())] * 3
    with optimizer.skip_synchronize():
        optimizer.step()


@needs_peers
def test_process_set_and_the_ranks_outside_of_it():
    members = [0, hvd.size() - 1]
    made = hvd.add_process_set(members if hvd.size() > 2 else [0])
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = hvd.DistributedOptimizer(sgd([parameter]), process_set=made)
    for _ in range(3):
        optimizer.zero_grad()
        (parameter.sum() * (hvd.rank() + 1)).backward()
        optimizer.step()
    average = sum(rank + 1 for rank in made.ranks) / len(made.ranks)
    assert parameter.grad.tolist() == [average if made.included() else hvd.rank() + 1] * 2
    del optimizer
    hvd.remove_process_set(made)


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


@needs_peers
def test_sparse_gradients_are_refused_with_a_remedy():
    embedding = torch.nn.Embedding(5, 2, sparse=True)
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(embedding.parameters(), lr=0.1))
    with pytest.raises(TypeError, match=r"gradient of .* must be dense, got torch.sparse_coo; make the layer with"):
        embedding(torch.tensor([1, 2])).sum().backward()
    del optimizer


@needs_peers
def test_different_parameters_are_an_error_on_every_rank():
    is_odd = hvd.rank() == hvd.size() - 1
    with pytest.raises(hvd.HorovodInternalError, match="ranks have different parameters or arguments") as caught:
        hvd.DistributedOptimizer(sgd([torch.nn.Parameter(torch.ones(2 + is_odd))]))
    assert f"rank {hvd.size() - 1}: allreduce.noname.0.0: torch.float32 [3]" in str(caught.value)
    with pytest.raises(hvd.HorovodInternalError, match="rank 0: nothing"):
        hvd.DistributedOptimizer(sgd([torch.nn.Parameter(torch.ones(2)) for _ in range(1 + is_odd)]))
    with pytest.raises(hvd.HorovodInternalError, match="2 backward passes per step"):
        hvd.DistributedOptimizer(sgd([torch.nn.Parameter(torch.ones(2))]), backward_passes_per_step=1 + is_odd)
    with pytest.raises(hvd.HorovodInternalError, match="op='max'"):
        hvd.DistributedOptimizer(sgd([torch.nn.Parameter(torch.ones(2))]), op=hvd.Max if is_odd else hvd.Sum)


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
    before = len(reclaimer._free)
    gc.disable()  # nothing of an optimizer may be left to it
    try:
        for _ in range(20):
            parameter = torch.nn.Parameter(torch.ones(1000))
            optimizer = hvd.DistributedOptimizer(sgd([parameter]))
            for _ in range(2):
                parameter.sum().backward()
                optimizer.step()
        # This one and its predecessor, which was still there when this one was made: a communicator and memory each.
        assert len(reclaimer._free) <= before + 4
        views = weakref.WeakSet(slot.view for slot in optimizer._reducer._slots)
        del optimizer, parameter
        assert len(views) == 0
    finally:
        gc.enable()


def test_wrapping_twice_is_refused():
    optimizer = hvd.DistributedOptimizer(sgd([torch.nn.Parameter(torch.ones(1))]))
    with pytest.raises(ValueError, match="optimizer: is distributed already"):
        hvd.DistributedOptimizer(optimizer)


def test_gradients_are_those_of_the_ranks_averaged():
    model, optimizer, _, _ = pair()
    alone = Net()
    loss_of(alone, 0, shard).backward()
    loss_of(model, 0, shard).backward()
    optimizer.synchronize()
    for mine, own in itertools.zip_longest(model.parameters(), alone.parameters()):
        torch.testing.assert_close(mine.grad, hvd.allreduce(own.grad), rtol=1e-6, atol=1e-7)
