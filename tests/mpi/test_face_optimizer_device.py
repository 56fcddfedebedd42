"""`DistributedOptimizer` with gradients on a device.

Where there is none, parameters lie on the host and only the buckets in the memory of the stand-in for CuPy: what torch
does is then done at once, so these tests wait where the stream of the caller would.
"""

from __future__ import annotations

import contextlib

import pytest

torch = pytest.importorskip("torch")

import mpitrain.torch as hvd  # noqa: E402
from mpitrain.collectives import Communicator, device_direct  # noqa: E402
from mpitrain.memory import SharedDeviceArray  # noqa: E402
from mpitrain.memory.device import streams_of  # noqa: E402
from mpitrain.torch import device_buckets  # noqa: E402
from tests.support.devices import each_cupy  # noqa: E402
from tests.support.training import Net, batch, initialized, needs_peers, sgd  # noqa: E402

__all__ = ["each_cupy"]


@pytest.fixture
def host_ranks():
    """Those that have no device, where it is the stand-in's."""
    return set()


@pytest.fixture
def place(each_cupy, host_ranks, monkeypatch):
    """Return the device of the parameters, with `hvd` initialized."""
    is_real = "+standin" not in each_cupy.__version__
    if not is_real:
        _use_stand_in(monkeypatch, host_ranks)
    with initialized("600"):
        if is_real:
            torch.cuda.set_device(hvd.local_rank() % torch.cuda.device_count())
        yield torch.device("cuda", torch.cuda.current_device()) if is_real else torch.device("cpu")


def _use_stand_in(monkeypatch, host_ranks):
    allocate = Communicator.allocate

    def on_stand_in(comm, shape, dtype, *, device=None):
        return allocate(comm, shape, dtype, device=None if comm.rank in host_ranks else "cuda")

    @contextlib.contextmanager
    def callers_stream(tensor):
        stream = streams_of(0).compute
        yield stream
        stream.synchronize()

    monkeypatch.setattr(Communicator, "allocate", on_stand_in)
    monkeypatch.setattr(SharedDeviceArray, "tensor", _tensor)
    monkeypatch.setattr(device_direct, "hand_over", lambda array, event: event.synchronize())
    monkeypatch.setattr(device_buckets, "callers_stream", callers_stream)


def _tensor(array):
    bits = torch.from_numpy(array.flat._host.view("u1"))
    return bits.view(getattr(torch, array.dtype.name)).view(array.shape)


@pytest.fixture
def packs(monkeypatch):
    """Count the buckets that were filled by one launch."""
    counted = []
    pack = device_buckets.DeviceBucket._pack

    def counting(bucket, readers):
        counted.append(pack(bucket, readers))
        return counted[-1]

    monkeypatch.setattr(device_buckets.DeviceBucket, "_pack", counting)
    return counted


def train(place, model, optimizer, *, steps=6, take=None, clear=lambda optimizer: optimizer.zero_grad()):
    for step in range(steps):
        clear(optimizer)
        inputs, targets = (tensor.to(place) for tensor in batch(step))
        if take is not None:
            inputs, targets = take(inputs), take(targets)
        torch.nn.functional.mse_loss(model(inputs), targets).backward()
        optimizer.step()


def shard(tensor):
    return tensor[hvd.rank() :: hvd.size()]


def both(place, **options):
    """Return a model that all ranks train on shards, and one that each trains on the whole batch."""
    model, reference = Net().to(place), Net().to(place)
    optimizer = hvd.DistributedOptimizer(sgd(model.parameters()), model.named_parameters(), **options)
    return model, optimizer, reference, sgd(reference.parameters())


def assert_same(model, reference, tolerance=1e-5):
    for mine, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)


CLEARINGS = {
    "to none": lambda optimizer: optimizer.zero_grad(),
    "to zero": lambda optimizer: optimizer.zero_grad(set_to_none=False),
}


@needs_peers
@pytest.mark.parametrize("clearing", CLEARINGS)
def test_shards_follow_the_whole_batch(place, packs, clearing):
    model, optimizer, reference, single = both(place)
    train(place, model, optimizer, take=shard, clear=CLEARINGS[clearing])
    train(place, reference, single, clear=CLEARINGS[clearing])
    assert_same(model, reference)
    assert all(isinstance(bucket, device_buckets.DeviceBucket) for bucket in optimizer._reducer._buckets)
    assert len(optimizer._reducer._buckets) > 1
    # Gradients that are added to what is in the bucket are there already.
    assert all(packs) == (clearing == "to none")


@needs_peers
@pytest.mark.parametrize("predivide", [1.0, 2.0])
@pytest.mark.parametrize(
    ("compression", "tolerance"), [("none", 1e-5), ("fp16", 2e-2), ("bf16", 5e-2)], ids=["none", "fp16", "bf16"]
)
def test_scaled_and_cast_gradients(place, packs, compression, tolerance, predivide):
    model, optimizer, reference, single = both(
        place, compression=getattr(hvd.Compression, compression), gradient_predivide_factor=predivide
    )
    train(place, model, optimizer, take=shard)
    train(place, reference, single)
    assert_same(model, reference, tolerance)
    assert all(packs)
    assert model.first.weight.grad.dtype is torch.float32


@needs_peers
def test_parameter_without_a_gradient(place, packs):
    model, optimizer, reference, single = both(place)
    for step in range(4):
        for net, each, take in ((model, optimizer, shard), (reference, single, lambda tensor: tensor)):
            each.zero_grad()
            inputs, targets = (take(tensor.to(place)) for tensor in batch(step))
            hidden = net.first(inputs) if step % 2 else net.middle(torch.tanh(net.first(inputs)))
            torch.nn.functional.mse_loss(net.last(torch.tanh(hidden)), targets).backward()
            if each is single:
                for param in net.parameters():
                    param.grad = torch.zeros_like(param) if param.grad is None else param.grad
            each.step()
    assert_same(model, reference)
    assert not all(packs)


@needs_peers
def test_clipping_between_synchronize_and_step(place):
    model, optimizer, reference, single = both(place)
    for step in range(4):
        inputs, targets = (tensor.to(place) for tensor in batch(step))
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(model(shard(inputs)), shard(targets)).backward()
        optimizer.synchronize()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        with optimizer.skip_synchronize():
            optimizer.step()
        single.zero_grad()
        torch.nn.functional.mse_loss(reference(inputs), targets).backward()
        theirs = torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.1)
        single.step()
        torch.testing.assert_close(norm, theirs, rtol=1e-4, atol=1e-5)
    assert_same(model, reference)


@needs_peers
def test_ranks_on_the_host_and_on_a_device(place, host_ranks):
    if hvd.rank():
        host_ranks.update(range(1, hvd.size()))
        place = torch.device("cpu")
    model, optimizer, reference, single = both(place)
    train(place, model, optimizer, take=shard)
    train(place, reference, single)
    assert_same(model, reference)
    assert not any(memory.is_shared for memory in optimizer._reducer._memory.arrays.values())
