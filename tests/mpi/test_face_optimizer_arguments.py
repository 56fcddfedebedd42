"""The arguments of `DistributedOptimizer`."""

from __future__ import annotations

import copy
from typing import ClassVar

import pytest

torch = pytest.importorskip("torch")

import mpitrain.torch as hvd  # noqa: E402
from tests.support.adasum import adasum  # noqa: E402
from tests.support.training import (  # noqa: E402
    OPTIMIZERS,
    Net,
    assert_follows,
    assert_same_bits,
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


class AsDoubles:
    """Changes dtype and shape on the way, so that only what was compressed can be decompressed."""

    seen: ClassVar[list[tuple[int, ...]]] = []

    @staticmethod
    def compress(tensor):
        AsDoubles.seen.append(tuple(tensor.shape))
        return tensor.to(torch.float64).flatten() * 4, (tensor.dtype, tensor.shape)

    @staticmethod
    def decompress(tensor, context):
        dtype, shape = context
        return (tensor / 4).to(dtype).view(shape)


@pytest.mark.parametrize("options", [{}, {"gradient_predivide_factor": 2.0}, {"backward_passes_per_step": 2}])
def test_compressors_of_the_user(options):
    model, optimizer, reference, single = pair(compression=AsDoubles, **options)
    AsDoubles.seen.clear()
    for step in range(3):
        optimizer.zero_grad()
        single.zero_grad()
        for part in range(options.get("backward_passes_per_step", 1)):
            loss_of(model, 10 * step + part, shard).backward()
            loss_of(reference, 10 * step + part).backward()
        optimizer.step()
        single.step()
    assert_follows(model, reference)
    shapes = sorted(tuple(parameter.shape) for parameter in model.parameters())
    assert sorted(AsDoubles.seen) == sorted(shapes * 3 if hvd.size() > 1 else [])


@needs_peers
def test_compressed_gradients_that_do_not_fit_are_an_error_on_every_rank():
    class Ragged(AsDoubles):
        @staticmethod
        def compress(tensor):
            return tensor.flatten()[: 1 + hvd.rank()], None

    parameter = torch.nn.Parameter(torch.ones(4))
    optimizer = hvd.DistributedOptimizer(sgd([parameter]), compression=Ragged)
    parameter.sum().backward()
    with pytest.raises(hvd.HorovodInternalError, match="Mismatched ALLREDUCE tensor shapes"):
        optimizer.step()
    assert hvd.allreduce(torch.ones(1), op=hvd.Sum).item() == hvd.size()
    optimizer.zero_grad()


def groups_by_name(model, kind):
    first, middle, last = ([*each.parameters()] for each in (model.first, model.middle, model.last))
    return {"lists": [[*last, *first], middle], "part": [[first[0], last[1]]]}.get(kind, kind)


@pytest.mark.parametrize("groups", [0, 1, 4, 100, "lists", "part"])
def test_groups(groups):
    model, reference = Net(), Net()
    optimizer = hvd.DistributedOptimizer(
        sgd(model.parameters()), groups=groups_by_name(model, groups), gradient_predivide_factor=2.0
    )
    single = sgd(reference.parameters())
    for step in range(3):
        train_both(model, optimizer, reference, single, step)
    assert_follows(model, reference)
    if hvd.size() > 1:
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        buckets = [{names[id(slot.param)] for slot in bucket.slots} for bucket in optimizer._reducer._buckets]
        weights = {f"{layer}.{kind}" for layer in ("first", "middle", "last") for kind in ("weight", "bias")}
        middle = {"middle.weight", "middle.bias"}
        expected = {
            1: [weights],
            "lists": [middle, weights - middle],
            "part": [{"first.weight", "last.bias"}],
            4: [{"first.bias", "middle.weight"}, {"middle.bias"}, {"last.weight", "last.bias"}],
        }.get(groups, [])
        assert all(members in buckets for members in expected)
        assert set().union(*buckets) == weights


def test_number_of_groups_has_an_older_name():
    with pytest.warns(DeprecationWarning, match="`num_groups` has been replaced by `groups`"):
        model, optimizer, reference, single = pair(num_groups=2)
    train_both(model, optimizer, reference, single, 0)
    train_both(model, optimizer, reference, single, 1)
    assert_follows(model, reference)
    if hvd.size() > 1:
        assert len(optimizer._reducer._buckets) == 2


class Words(torch.nn.Module):
    """Sums of embedded words, through a dense layer."""

    def __init__(self, sparse):
        super().__init__()
        torch.manual_seed(7)
        self.embedding = torch.nn.Embedding(20, 4, sparse=sparse)
        self.dense = torch.nn.Linear(4, 3)

    def forward(self, words):
        return self.dense(self.embedding(words).sum(1)) if words is not None else self.dense(torch.ones(1, 4))


def words(step, rank):
    """Indices of this rank's words; None where it uses the dense layer only."""
    if (step + rank) % 3 == 2:
        return None
    return torch.randint(0, 20, (2, 3), generator=torch.Generator().manual_seed(10 * step + rank))


@pytest.mark.parametrize("options", [{}, {"sparse_as_dense": True}, {"compression": AsDoubles}, {"op": hvd.Sum}])
def test_sparse_gradients(options):
    model, reference = Words(sparse=True), Words(sparse=False)
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), **options)
    single = torch.optim.SGD(reference.parameters(), lr=0.1)
    divisor = 1 if options.get("op") is hvd.Sum else hvd.size()
    for step in range(5):
        optimizer.zero_grad()
        single.zero_grad()
        model(words(step, hvd.rank())).square().sum().backward()
        optimizer.step()
        for rank in range(hvd.size()):
            (reference(words(step, rank)).square().sum() / divisor).backward()
        single.step()
        grad = model.embedding.weight.grad
        assert grad is None if hvd.size() == 1 and words(step, 0) is None else grad.is_sparse
    assert_follows(model, reference)


@pytest.mark.parametrize("who", ["all", "one"])
def test_gradients_that_turn_out_to_be_sparse_later(who):
    model, reference = Words(sparse=True), Words(sparse=False)
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    single = torch.optim.SGD(reference.parameters(), lr=0.1)
    for step in range(4):
        for each in (optimizer, single):
            each.zero_grad()
        of_rank = [words(0, 0) if step and (who == "all" or not rank) else None for rank in range(hvd.size())]
        model(of_rank[hvd.rank()]).square().sum().backward()
        for indices in of_rank:
            (reference(indices).square().sum() / hvd.size()).backward()
        optimizer.step()
        single.step()
    assert_follows(model, reference)


def test_an_optimizer_for_sparse_gradients_only():
    model, reference = Words(sparse=True).embedding, Words(sparse=True).embedding
    optimizer = hvd.DistributedOptimizer(torch.optim.SparseAdam(model.parameters(), lr=0.1))
    single = torch.optim.SparseAdam(reference.parameters(), lr=0.1)
    for step in range(3):
        for net, each, ranks in ((model, optimizer, [hvd.rank()]), (reference, single, range(hvd.size()))):
            each.zero_grad()
            for rank in ranks:
                (net(torch.tensor([step, 5 + rank])).square().sum() / len(ranks)).backward()
            each.step()
    assert_follows(model, reference)


@pytest.mark.parametrize("is_scaled", [True, False])
def test_local_parameters_keep_the_gradient_of_this_rank(is_scaled):
    model, reference = Net(), Net()
    optimizer = hvd.DistributedOptimizer(sgd(model.parameters()), scale_local_gradients=is_scaled)
    train_both(model, optimizer, reference, sgd(reference.parameters()), 0)
    for parameter in model.last.parameters():
        optimizer.register_local_var(parameter)
    for step in (1, 2):
        alone = copy.deepcopy(model)
        optimizer.zero_grad()
        alone.zero_grad()
        for net in (model, alone):
            loss_of(net, step, shard).backward()
        optimizer.synchronize()
        size = hvd.size() if is_scaled else 1
        for (name, mine), own in zip(model.named_parameters(), alone.parameters(), strict=True):
            expected = own.grad / size if name.startswith("last") else hvd.allreduce(own.grad)
            torch.testing.assert_close(mine.grad, expected, rtol=1e-6, atol=1e-7)
        with optimizer.skip_synchronize():
            optimizer.step()


def test_local_parameters_must_be_the_optimizers_and_between_steps():
    model, optimizer, _, _ = pair()
    with pytest.raises(ValueError, match=r"register_local_var: must be a parameter of the optimizer, got .* \[3\]"):
        optimizer.register_local_var(torch.nn.Parameter(torch.ones(3)))
    if hvd.size() > 1:
        loss_of(model, 0, shard).backward()
        with pytest.raises(AssertionError, match=r"register_local_var\(\) was called after loss.backward\(\) but"):
            optimizer.register_local_var(model.last.bias)
        optimizer.step()


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("passes", [1, 2])
def test_adasum_combines_the_steps_of_all_ranks(kind, passes):
    model = Net()
    optimizer = hvd.DistributedOptimizer(
        OPTIMIZERS[kind](model.parameters()),
        named_parameters=model.named_parameters(),
        op=hvd.Adasum,
        backward_passes_per_step=passes,
    )
    nets = [Net() for _ in range(hvd.size())]
    singles = [OPTIMIZERS[kind](net.parameters()) for net in nets]
    for step in range(3):
        starts = [parameter.detach().clone() for parameter in nets[0].parameters()]
        for net, each, rank in [(model, optimizer, hvd.rank()), *zip(nets, singles, range(hvd.size()), strict=True)]:
            each.zero_grad()
            for part in range(passes):
                loss_of(net, 10 * step + part, lambda tensor: tensor[rank :: hvd.size()]).backward()  # noqa: B023
            # Gradients are of this rank only, so they are clipped without waiting for others.
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            each.step()
        for index, start in enumerate(starts):
            replicas = [list(net.parameters())[index] for net in nets]
            changes = [(replica.detach() - start).double().numpy() for replica in replicas]
            combined = (start.double() + torch.from_numpy(adasum(changes))).to(torch.float32)
            with torch.no_grad():
                for replica in replicas:
                    replica.copy_(combined)
    assert_follows(model, nets[0])


@needs_peers
def test_adasum_guards_and_leaves_alone_what_is_local():
    model = Net()
    optimizer = hvd.DistributedOptimizer(sgd(model.parameters()), op=hvd.Adasum, compression=hvd.Compression.fp16)
    optimizer.register_local_var(model.last.bias)
    start = model.last.bias.detach().clone()
    for step in range(2):
        optimizer.zero_grad()
        loss_of(model, step, shard).backward()
        with pytest.raises(AssertionError, match=r"zero_grad\(\) was called after loss.backward\(\) but before"):
            optimizer.zero_grad()
        with pytest.raises(AssertionError, match="more than backward_passes_per_step times"):
            loss_of(model, step, shard).backward()
        optimizer.synchronize()
        with optimizer.skip_synchronize():
            optimizer.step()
    changes = hvd.allgather_object((model.last.bias - start).tolist())
    assert len({tuple(change) for change in changes}) == hvd.size()
    model.last.bias = None
    assert_same_bits(model)
