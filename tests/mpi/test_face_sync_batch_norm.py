"""`SyncBatchNorm`: the batches of all ranks are normalized as one process does it with the whole batch."""

from __future__ import annotations

import copy
import io

import pytest

torch = pytest.importorskip("torch")

import mpitrain.torch as hvd  # noqa: E402
from tests.support.training import assert_follows, initialized, needs_peers, sgd  # noqa: E402

CHANNELS = 3
SHAPES = {"2D": (), "3D": (5,), "4D": (4, 3), "5D": (2, 3, 2)}


@pytest.fixture(scope="module", autouse=True)
def _initialized():
    with initialized():
        yield


def rows_by_rank(size):
    """Uneven, with an empty batch on one rank."""
    rows = [4, 0, 2, 1][:size]
    return [rows[0] + 7 - sum(rows), *rows[1:]]


def whole_batch(step, shape=(), dtype=torch.float64):
    generator = torch.Generator().manual_seed(step)
    scale = torch.arange(1, CHANNELS + 1).view(1, -1, *[1] * len(shape))
    return (torch.randn(7, CHANNELS, *shape, generator=generator, dtype=torch.float64) * scale + scale).to(dtype)


def part(tensor, rank=None, size=None):
    rows = rows_by_rank(size or hvd.size())
    rank = hvd.rank() if rank is None else rank
    return tensor[sum(rows[:rank]) : sum(rows[: rank + 1])]


def both(**options):
    """The layer and its twin in one process, with weights that differ by channel."""
    options.setdefault("dtype", torch.float64)
    layer, reference = hvd.SyncBatchNorm(CHANNELS, **options), torch.nn.BatchNorm3d(CHANNELS, **options)
    reference._check_input_dim = lambda _: None
    for each in (layer, reference):
        if each.affine:
            with torch.no_grad():
                each.weight.copy_(torch.tensor([0.5, 1.0, 2.0]))
                each.bias.copy_(torch.tensor([1.0, -1.0, 0.0]))
    return layer, reference


def summed(tensor):
    return hvd.allreduce(tensor, op=hvd.Sum)


def assert_statistics_follow(layer, reference, tolerance=1e-10):
    for name, mine in layer.named_buffers():
        torch.testing.assert_close(mine, reference.get_buffer(name), rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize("dims", SHAPES)
@pytest.mark.parametrize("options", [{}, {"affine": False, "momentum": None, "eps": 1e-2}], ids=["affine", "plain"])
def test_forward_and_backward_are_those_of_the_whole_batch(dims, options):
    shape = SHAPES[dims]
    layer, reference = both(**options)
    for step in range(3):
        whole = whole_batch(step, shape).requires_grad_()
        mine = part(whole.detach()).clone().requires_grad_()
        weights = torch.cos(whole_batch(100 + step, shape))
        output, expected = layer(mine), reference(whole)
        torch.testing.assert_close(output, part(expected), rtol=1e-10, atol=1e-10)
        (output.square() * part(weights)).sum().backward()
        (expected.square() * weights).sum().backward()
        torch.testing.assert_close(mine.grad, part(whole.grad), rtol=1e-9, atol=1e-9)
    for (name, parameter), theirs in zip(layer.named_parameters(), reference.parameters(), strict=True):
        # What each rank has is its part of the sum.
        torch.testing.assert_close(summed(parameter.grad), theirs.grad, rtol=1e-9, atol=1e-9, msg=name)
    assert_statistics_follow(layer, reference)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_statistics_of_small_floats_are_wide(dtype):
    layer, reference = both(dtype=torch.float32)
    whole = whole_batch(0, (40, 40), dtype)
    mine = part(whole).clone().requires_grad_()
    wide = whole.float().requires_grad_()
    output, expected = layer(mine), reference(wide)
    assert output.dtype == dtype
    tolerance = {torch.float16: 4e-3, torch.bfloat16: 4e-2, torch.float32: 1e-5}[dtype]
    torch.testing.assert_close(output.float(), part(expected), rtol=tolerance, atol=tolerance)
    assert_statistics_follow(layer, reference, 1e-5)
    weights = torch.sin(whole_batch(1, (40, 40), torch.float32))
    (output.float() * part(weights)).sum().backward()
    (expected * weights).sum().backward()
    assert mine.grad.dtype == dtype
    torch.testing.assert_close(mine.grad.float(), part(wide.grad), rtol=tolerance, atol=tolerance)


def test_variance_that_is_small_beside_the_mean():
    layer = hvd.SyncBatchNorm(CHANNELS, momentum=1.0)
    whole = whole_batch(0, (30, 30)) * 0.01 + 1000.0 * (1 + torch.arange(7).view(7, 1, 1, 1) % 2 * 1e-5)
    layer(part(whole).float())
    exact = whole.float().double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(layer.running_var.double(), exact.var(1), rtol=5e-3, atol=0)
    torch.testing.assert_close(layer.running_mean.double(), exact.mean(1), rtol=1e-6, atol=0)


def test_gradients_are_the_slopes_of_the_sum_over_all_ranks():
    layer, _ = both()
    generator = torch.Generator().manual_seed(hvd.rank())
    mine = torch.randn(2 + hvd.rank(), CHANNELS, 4, generator=generator, dtype=torch.float64)
    weights, direction = (torch.randn(mine.shape, generator=generator, dtype=torch.float64) for _ in range(2))

    def loss(offset):
        return (layer(mine + offset * direction).sin() * weights).sum()

    offset = torch.zeros((), dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(loss(offset), offset)
    with torch.no_grad():
        numeric = (loss(1e-5) - loss(-1e-5)) / 2e-5
    # One rank's inputs move the outputs of all.
    assert summed(slope).item() == pytest.approx(summed(numeric).item(), rel=1e-7, abs=1e-8)


def test_evaluation_needs_no_other_rank():
    layer, reference = both()
    layer(part(whole_batch(0)))
    reference(whole_batch(0))
    if hvd.rank() == 0:
        for each in (layer, reference):
            each.eval()
        mine = whole_batch(1, (4,))
        torch.testing.assert_close(layer(mine), reference(mine), rtol=1e-10, atol=1e-10)


def test_without_running_statistics_batches_are_used_in_evaluation_as_well():
    layer, reference = both(track_running_stats=False)
    for each in (layer, reference):
        each.eval()
    torch.testing.assert_close(layer(part(whole_batch(0))), part(reference(whole_batch(0))), rtol=1e-10, atol=1e-10)


@needs_peers
def test_what_cannot_be_normalized_is_refused_on_every_rank():
    layer, _ = both()
    before = copy.deepcopy(layer)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training, got 1 on all ranks"):
        layer(whole_batch(0)[: 1 if hvd.rank() == 0 else 0])
    assert layer(whole_batch(0)[:0]).shape == (0, CHANNELS)
    torch.testing.assert_close(layer.running_mean, before.running_mean)
    with pytest.raises(ValueError, match="input must have at least 2 dimensions, got 1"):
        layer(torch.ones(CHANNELS))
    with pytest.raises(ValueError, match=r"must have 3 channels in dimension 1, got \[2, 4\]"):
        layer(torch.ones(2, 4))
    other = hvd.SyncBatchNorm(2 + (hvd.rank() == 0))
    with pytest.raises(hvd.HorovodInternalError, match="Mismatched ALLGATHER tensor shapes"):
        other(torch.ones(4, other.num_features))


@needs_peers
def test_a_process_set_normalizes_together():
    members = hvd.add_process_set(list(range(1, hvd.size())))
    layer = hvd.SyncBatchNorm(CHANNELS, process_set=members, dtype=torch.float64)
    reference = torch.nn.BatchNorm1d(CHANNELS, dtype=torch.float64)
    if members.included():
        expected = part(reference(whole_batch(0)), members.rank(), members.size())
        mine = part(whole_batch(0), members.rank(), members.size())
    else:
        mine = whole_batch(0)[:3]
        expected = reference(mine)
    torch.testing.assert_close(layer(mine), expected, rtol=1e-10, atol=1e-10)
    assert copy.deepcopy(layer).process_set is members
    hvd.remove_process_set(members)


class Pictures(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        layers = torch.nn.Conv2d(2, 4, 3, bias=False), torch.nn.BatchNorm2d(4), torch.nn.ReLU(), torch.nn.Flatten()
        self.layers = torch.nn.Sequential(*layers, torch.nn.Linear(64, 8), torch.nn.BatchNorm1d(8))
        self.last = torch.nn.Linear(8, 1)

    def forward(self, inputs):
        return self.last(torch.relu(self.layers(inputs)))


def test_a_converted_model_trains_as_one_process_does():
    model, reference = Pictures().double(), Pictures().double()
    converted = hvd.SyncBatchNorm.convert_sync_batchnorm(model)
    assert converted is model
    kinds = [type(layer) for layer in model.layers]
    assert kinds.count(hvd.SyncBatchNorm) == 2
    assert model.state_dict().keys() == reference.state_dict().keys()
    optimizer = hvd.DistributedOptimizer(sgd(model.parameters()), named_parameters=model.named_parameters())
    single = sgd(reference.parameters())
    for step in range(3):
        images = torch.randn(12, 2, 6, 6, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        mine = images[hvd.rank() :: hvd.size()]
        for net, each, inputs in ((model, optimizer, mine), (reference, single, images)):
            each.zero_grad()
            net(inputs).square().mean().backward()
            each.step()
    assert_follows(model, reference, 1e-9)
    assert_statistics_follow(model, reference, 1e-9)
    stored = io.BytesIO()
    torch.save(model, stored)
    stored.seek(0)
    loaded = torch.load(stored, weights_only=False)
    assert loaded.layers[1].process_set is hvd.global_process_set
    assert hvd.SyncBatchNorm.convert_sync_batchnorm(loaded.layers[1]) is loaded.layers[1]
    torch.testing.assert_close(loaded(mine), model(mine))
