"""Gradients through every operation: against one process that does the work of all, and against differences."""

from __future__ import annotations

import concurrent.futures
import functools
import time

import pytest

torch = pytest.importorskip("torch")

import mpitrain.torch as hvd  # noqa: E402
from tests.support.limits import HANG_S  # noqa: E402


@pytest.fixture(scope="module", autouse=True)
def _initialized():
    hvd.init()
    yield
    hvd.shutdown()


def brought(rank, shape, dtype=torch.float64):
    """Different by rank and index, with ties between ranks and with zeros."""
    count = torch.Size(shape).numel()
    return torch.tensor(
        [(3 * index + 2 * rank + index * rank) % 5 - 2.0 for index in range(count)], dtype=dtype
    ).reshape(shape)


def parts(tensor):
    return list(torch.tensor_split(tensor, hvd.size()))


def routed(brought_by, rank):
    """What ranks get that are sent d + 1 rows by everybody; further rows stay where they are."""
    begin = rank * (rank + 1) // 2
    return torch.cat([tensor[begin : begin + rank + 1] for tensor in brought_by])


SPLITS = lambda: list(range(1, hvd.size() + 1))  # noqa: E731
ROWS = 14

# For each operation: shapes by rank, the call, what one process would compute for a rank, and the factor that Horovod's
# rule has over the derivative of the sum of all ranks' losses.
CASES = {
    "sum": (lambda rank: (4, 3), lambda x: hvd.allreduce(x, op=hvd.Sum), lambda xs, rank: sum(xs), 1),
    "average": (lambda rank: (4, 3), hvd.allreduce, lambda xs, rank: sum(xs) / len(xs), 1),
    "scaled": (
        lambda rank: (),
        lambda x: hvd.allreduce(x, op=hvd.Sum, prescale_factor=0.3, postscale_factor=-2.0),
        lambda xs, rank: -0.6 * sum(xs),
        1,
    ),
    "max": (lambda rank: (4, 3), lambda x: hvd.allreduce(x, op=hvd.Max), lambda xs, rank: torch.stack(xs).amax(0), 1),
    "min": (
        lambda rank: (7,),
        lambda x: hvd.allreduce(x, op=hvd.Min, prescale_factor=-0.3, postscale_factor=-1.7),
        lambda xs, rank: -1.7 * (-0.3 * torch.stack(xs)).amin(0),
        1,
    ),
    "product": (
        lambda rank: (30,),
        lambda x: hvd.allreduce(x, op=hvd.Product, prescale_factor=0.5, postscale_factor=3.0),
        lambda xs, rank: 3.0 * (0.5 * torch.stack(xs)).prod(0),
        1,
    ),
    "allgather": (lambda rank: (3, 2), hvd.allgather, lambda xs, rank: torch.cat(xs), "average"),
    "allgather uneven": (lambda rank: (rank, 2), hvd.allgather, lambda xs, rank: torch.cat(xs), "average"),
    "allgather scalar": (lambda rank: (), hvd.allgather, lambda xs, rank: torch.stack(xs), "average"),
    "broadcast": (
        lambda rank: (4,),
        lambda x: hvd.broadcast(x, hvd.size() - 1),
        lambda xs, rank: xs[-1] + 0.0 * sum(xs),
        "average",
    ),
    "alltoall": (
        lambda rank: (2 * hvd.size(), 3),
        hvd.alltoall,
        lambda xs, rank: torch.cat([parts(x)[rank] for x in xs]),
        1,
    ),
    "alltoall with splits": (
        lambda rank: (ROWS, 2),
        lambda x: hvd.alltoall(x, splits=SPLITS())[0],
        routed,
        1,
    ),
    "reducescatter": (
        lambda rank: (5, 2),
        hvd.reducescatter,
        lambda xs, rank: parts(sum(xs) / len(xs))[rank],
        "gather",
    ),
    "reducescatter sum": (
        lambda rank: (hvd.size() + 1,),
        lambda x: hvd.reducescatter(x, op=hvd.Sum, prescale_factor=2.0, postscale_factor=0.25),
        lambda xs, rank: parts(sum(xs) / 2)[rank],
        "gather",
    ),
}


def convention(factor):
    return {"average": 1 / hvd.size(), "gather": hvd.size()}.get(factor, 1)


def loss(y):
    weights = torch.arange(1.0, 1 + y.numel(), dtype=y.dtype).reshape(y.shape)
    return (weights * (y + 1).square()).sum()


def expected_gradient(case, dtype=torch.float64):
    shape, _, reference, factor = CASES[case]
    leaves = [brought(rank, shape(rank), dtype).requires_grad_() for rank in range(hvd.size())]
    total = sum((rank + 1) * loss(reference(leaves, rank)) for rank in range(hvd.size()))
    return torch.autograd.grad(total, leaves[hvd.rank()])[0] * convention(factor)


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_one_process(case):
    shape, call, reference, _ = CASES[case]
    mine = brought(hvd.rank(), shape(hvd.rank())).requires_grad_()
    everybodys = [brought(rank, shape(rank)) for rank in range(hvd.size())]
    result = call(mine)
    torch.testing.assert_close(result, reference(everybodys, hvd.rank()))
    ((hvd.rank() + 1) * loss(result)).backward()
    torch.testing.assert_close(mine.grad, expected_gradient(case))


class Scaled(torch.autograd.Function):
    """The identity, with a factor for gradients."""

    @staticmethod
    def forward(ctx, tensor, factor):
        ctx.factor = factor
        return tensor.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.factor, None


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_differences(case):
    """One function of a shared input on all ranks, whose differences all ranks take in step."""
    _, call, _, factor = CASES[case]
    rank, size = hvd.rank(), hvd.size()
    shapes = {"alltoall": (2 * size, 2), "alltoall with splits": (ROWS, 1), "allgather scalar": ()}

    def function(shared):
        # Its gradient is the mean over ranks, as is what is returned.
        own = hvd.allreduce(shared) * (1.0 + 0.1 * rank) + 0.05 * rank
        result = Scaled.apply(call(own), 1 / convention(factor))
        return hvd.allreduce(loss(result) * (rank + 1))

    shared = torch.linspace(0.5, 1.5, torch.Size(shapes.get(case, (3, 2))).numel(), dtype=torch.float64)
    shared = shared.reshape(shapes.get(case, (3, 2))).requires_grad_()
    assert torch.autograd.gradcheck(function, (shared,), fast_mode=True)
    # Second derivatives are the rules applied twice. That for a reduce-scatter has that for an all-gather in it, and
    # Horovod's factors of the two do not belong to one function.
    if case not in ("min", "max", "product", "reducescatter", "reducescatter sum"):
        assert torch.autograd.gradgradcheck(function, (shared,), fast_mode=True)


def test_grouped_gradients():
    size, rank = hvd.size(), hvd.rank()
    count = torch.tensor([rank, 2])
    for operation, case in (
        (functools.partial(hvd.grouped_allreduce, op=hvd.Sum), "sum"),
        (functools.partial(hvd.grouped_allreduce, op=hvd.Max), "max"),
        (hvd.grouped_allgather, "allgather"),
        (hvd.grouped_reducescatter, "reducescatter"),
    ):
        shape = CASES[case][0](rank)
        first, second = (brought(rank, shape).requires_grad_() for _ in range(2))
        constant = brought(rank, (2, 2))
        # Whole numbers have no gradient, and a tensor that requires none gets none.
        results = operation([first, count, constant, second])
        assert [result.requires_grad for result in results] == [True, False, True, True]
        sum((rank + 1) * loss(result) for result in (results[0], results[3])).backward()
        for tensor in (first, second):
            torch.testing.assert_close(tensor.grad, expected_gradient(case))
    assert size == hvd.size()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_of_other_dtypes(dtype):
    for case in ("sum", "max", "allgather", "reducescatter"):
        shape, call, _, _ = CASES[case]
        mine = brought(hvd.rank(), shape(hvd.rank()), dtype).requires_grad_()
        ((hvd.rank() + 1) * loss(call(mine))).backward()
        assert mine.grad.dtype == dtype
        torch.testing.assert_close(mine.grad.double(), expected_gradient(case), rtol=0.02, atol=0.02)


def test_gradients_through_compression():
    mine = brought(hvd.rank(), (4, 3), torch.float32).requires_grad_()
    result = hvd.allreduce(mine, op=hvd.Sum, compression=hvd.Compression.fp16)
    ((hvd.rank() + 1) * loss(result)).backward()
    assert mine.grad.dtype == torch.float32
    torch.testing.assert_close(mine.grad.double(), expected_gradient("sum"), rtol=1e-3, atol=1e-3)


def test_backward_passes_in_different_order():
    """Of threads, each of which waits; also under names that are used again and again, and under none."""
    size, rank = hvd.size(), hvd.rank()
    weights = [torch.tensor(float(index), dtype=torch.float64, requires_grad=True) for index in range(9)]
    kinds = (
        lambda x, name: hvd.allreduce(x, op=hvd.Sum, name=name),
        lambda x, name: hvd.allgather(x, name=name).sum() * size,
        lambda x, name: hvd.reducescatter(x.repeat(size), name=name)[0],
    )
    results = [kinds[index % 3](weight * (rank + 1), ("a", None)[index % 2]) for index, weight in enumerate(weights)]
    order = list(range(9))
    with concurrent.futures.ThreadPoolExecutor(len(order)) as threads:
        waiting = []
        for index in order[rank:] + order[:rank]:
            waiting.append(threads.submit((results[index] * (index + 1)).backward))
            time.sleep(1e-3)
        for each in waiting:
            each.result(HANG_S)
    for index, weight in enumerate(weights):
        # Horovod's rule for a reduce-scatter gathers: each of the repeated rows has the gradient of its rank.
        assert weight.grad.item() == (index + 1) * size * (rank + 1)


def test_nothing_is_recorded_without_need():
    tensor = torch.ones(2, 2)
    assert not hvd.allreduce(tensor).requires_grad
    tensor.requires_grad_()
    with torch.no_grad():
        for result in (hvd.allreduce(tensor), hvd.allgather(tensor), hvd.broadcast(tensor, 0)):
            assert result.grad_fn is None
    for handle in (hvd.allreduce_async(tensor), hvd.allgather_async(tensor), hvd.broadcast_async(tensor, 0)):
        assert not hvd.synchronize(handle).requires_grad


def test_what_has_no_gradient_says_so():
    tensor = torch.ones(4, requires_grad=True)
    with pytest.raises(ValueError, match="reducescatter: max has no gradient; use Average or Sum"):
        hvd.reducescatter(tensor, op=hvd.Max).sum().backward()
    (gradient,) = torch.autograd.grad(hvd.allreduce(tensor, op=hvd.Max).square().sum(), tensor, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.mpi(min_size=3)
def test_gradients_within_a_process_set():
    pair = hvd.add_process_set([0, hvd.size() - 1])
    if pair.included():
        mine = torch.tensor([1.0 + pair.rank()], requires_grad=True)
        result = hvd.allgather(hvd.allreduce(mine, op=hvd.Sum, process_set=pair), process_set=pair)
        assert result.tolist() == [3.0, 3.0]
        (result * torch.tensor([1.0, 10.0]) * (pair.rank() + 1)).sum().backward()
        # Averages over the pair, (1 + 2) / 2, of each part, and then the sum of both.
        assert mine.grad.item() == 16.5
    assert hvd.remove_process_set(pair)
