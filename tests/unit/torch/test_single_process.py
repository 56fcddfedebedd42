"""One process that nobody launched: everything works without communication, and arguments are checked the same."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

import mpitrain.torch as hvd  # noqa: E402


@pytest.fixture(scope="module", autouse=True)
def _initialized():
    hvd.init()
    yield
    hvd.shutdown()


def parameter():
    return torch.nn.Parameter(torch.ones(2))


def sgd(*params):
    return torch.optim.SGD(params or [parameter()], lr=0.1, momentum=0.9)


def test_ranks():
    assert (hvd.rank(), hvd.size(), hvd.local_rank(), hvd.local_size()) == (0, 1, 0, 1)
    assert (hvd.cross_rank(), hvd.cross_size(), hvd.is_homogeneous()) == (0, 1, True)


def test_operations_return_what_went_in():
    tensor = torch.arange(6.0).reshape(2, 3)
    for result in (
        hvd.allreduce(tensor),
        hvd.allgather(tensor),
        hvd.broadcast(tensor, 0),
        hvd.alltoall(tensor),
        hvd.reducescatter(tensor),
        hvd.grouped_allreduce([tensor])[0],
    ):
        assert torch.equal(result, tensor)
        assert result.data_ptr() != tensor.data_ptr()
    assert hvd.allreduce_(tensor) is tensor
    assert hvd.broadcast_object({"a": 1}) == {"a": 1}
    assert hvd.allgather_object(3) == [3]
    hvd.barrier()


def test_optimizer_is_a_plain_one():
    mine, theirs = parameter(), parameter()
    optimizer, reference = hvd.DistributedOptimizer(sgd(mine)), sgd(theirs)
    for _ in range(3):
        for each, weight in ((optimizer, mine), (reference, theirs)):
            each.zero_grad()
            weight.square().sum().backward()
            each.step()
    assert torch.equal(mine, theirs)
    # Nothing is in flight, so nothing is guarded.
    mine.sum().backward()
    optimizer.zero_grad()
    optimizer.synchronize()
    optimizer.step()


def test_names_must_be_pairs_unique_and_complete():
    first, second = parameter(), parameter()
    wrap = hvd.DistributedOptimizer
    with pytest.raises(ValueError, match="named_parameters should be a sequence of tuples"):
        wrap(sgd(first), named_parameters=[first])
    with pytest.raises(ValueError, match=r"must be unique\. Found duplicates: a"):
        wrap(sgd(first, second), named_parameters=[("a", first), ("a", second)])
    with pytest.raises(ValueError, match=r"one or more model parameters were not named: 1 of 2, .* shape \[2\]"):
        wrap(sgd(first, second), named_parameters=[("a", first)])
    # More names than the optimizer has parameters are fine: a model with several optimizers.
    wrap(sgd(first), named_parameters=[("a", first), ("b", second)])
    wrap(sgd(first), named_parameters=iter([("a", first)]))


@pytest.mark.parametrize("passes", [0, -1])
def test_passes_must_be_positive(passes):
    with pytest.raises(ValueError, match="backward_passes_per_step: must be at least 1"):
        hvd.DistributedOptimizer(sgd(), backward_passes_per_step=passes)
    with pytest.raises(ValueError, match="backward_passes_per_step: must be at least 1"):
        hvd.DistributedOptimizer(sgd()).set_backward_passes_per_step(passes)


def test_predivision_is_for_averages():
    with pytest.raises(ValueError, match="gradient_predivide_factor not supported with op != Average"):
        hvd.DistributedOptimizer(sgd(), op=hvd.Sum, gradient_predivide_factor=2.0)


def test_unknown_reductions_are_refused():
    with pytest.raises(ValueError, match="op: unknown reduction, got 17"):
        hvd.DistributedOptimizer(sgd(), op=17)


def test_a_compression_must_compress():
    with pytest.raises(
        ValueError, match=r"compression: must be Compression\.none, .* with compress and decompress, got"
    ):
        hvd.DistributedOptimizer(sgd(), compression=hvd.Compression)


def test_groups_must_be_a_number_or_different_parameters():
    first, second = parameter(), parameter()
    for groups, message in {
        -1: "groups should be a non-negative integer or a list of list of torch.Tensor, got -1",
        "ab": "groups should be a non-negative integer",
        (1, 2): "groups should be a non-negative integer or a list",
        ((first, 3),): "groups must consist of torch.Tensor, got int",
        ((first, second), (first,)): r"A parameter can only appear once in groups, got one of shape \[2\]",
    }.items():
        with pytest.raises(ValueError, match=message):
            hvd.DistributedOptimizer(sgd(first, second), groups=groups)


def test_process_set_must_be_registered():
    with pytest.raises(ValueError, match="Process set provided does not exist"):
        hvd.DistributedOptimizer(sgd(), process_set=hvd.ProcessSet([0]))
