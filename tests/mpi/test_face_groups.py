"""Grouped all-gather and reduce-scatter, and all-reduce of sparse tensors."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

import mpitrain.torch as hvd  # noqa: E402

DTYPES = [torch.float32, torch.int64, torch.bfloat16, torch.float64, torch.uint8]


@pytest.fixture(scope="module", autouse=True)
def _initialized():
    hvd.init()
    yield
    hvd.shutdown()


def brought(rank):
    """Rows that differ by rank, none among them, of every kind of shape; the last two are too large to be fused."""
    small = [torch.arange(2.0 * (rank + index)).reshape(-1, 2).to(dtype) + rank for index, dtype in enumerate(DTYPES)]
    mixed = [torch.tensor(rank), torch.empty(0, 3), torch.arange(12.0).reshape(3, 4).T + rank]
    return [*small, *mixed, torch.full((30_000 * rank, 3), rank), torch.full((100_000,), float(rank))]


def assert_same(result, expected):
    assert result.dtype == expected.dtype
    assert torch.equal(result, expected)


def test_grouped_allgather():
    mine = brought(hvd.rank())
    kept = [tensor.clone() for tensor in mine]
    everybodys = [[torch.atleast_1d(tensor) for tensor in brought(rank)] for rank in range(hvd.size())]
    expected = [torch.cat(parts) for parts in zip(*everybodys, strict=True)]
    synchronous = hvd.grouped_allgather(mine, "a", hvd.global_process_set)
    assert type(synchronous) is list
    handle = hvd.grouped_allgather_async(mine, name="a")
    asynchronous = hvd.synchronize(handle)
    assert type(asynchronous) is tuple
    for results in (synchronous, asynchronous):
        for result, want in zip(results, expected, strict=True):
            assert_same(result, want)
    for tensor, before in zip(mine, kept, strict=True):
        assert_same(tensor, before)
    assert hvd.grouped_allgather([]) == []
    (single,) = hvd.grouped_allgather([torch.ones(1, dtype=torch.bool)])
    assert single.tolist() == [True] * hvd.size()


def scattered(rank):
    small = [torch.arange(7.0).reshape(7, 1), torch.arange(2.0 * hvd.size() + 1), torch.empty(0, 2)]
    mixed = [torch.arange(20).reshape(4, 5).T, torch.arange(3.0, dtype=torch.float64), torch.arange(9.0).half()]
    return [tensor * (rank + 1) for tensor in [*small, *mixed, torch.arange(70_001.0)]]


@pytest.mark.parametrize("op", [hvd.Average, hvd.Sum, hvd.Min])
def test_grouped_reducescatter(op):
    size, rank = hvd.size(), hvd.rank()
    factor = {hvd.Average: (size + 1) / 2, hvd.Sum: size * (size + 1) / 2, hvd.Min: 1.0}[op]
    mine = scattered(rank)
    expected = [torch.tensor_split(tensor.double() * factor, size)[rank] for tensor in scattered(0)]
    forms = [
        hvd.grouped_reducescatter(mine, "a", hvd.Compression.none, op, hvd.global_process_set, 1.0, 1.0),
        hvd.synchronize(hvd.grouped_reducescatter_async(mine, "a", op, hvd.global_process_set, 1.0, 1.0)),
    ]
    assert [type(form) for form in forms] == [list, tuple]
    for results in forms:
        for tensor, result, want in zip(mine, results, expected, strict=True):
            assert result.dtype == tensor.dtype
            truncated = want if tensor.is_floating_point() else want.trunc()
            torch.testing.assert_close(result.double(), truncated, rtol=1e-6, atol=0)
    for tensor, before in zip(mine, scattered(rank), strict=True):
        assert_same(tensor, before)
    floats = [tensor for tensor in mine if tensor.is_floating_point()][:2]
    halved = hvd.grouped_reducescatter(floats, compression=hvd.Compression.fp16, op=op, prescale_factor=0.5)
    for result, want in zip(halved, expected[:2], strict=True):
        torch.testing.assert_close(result, want.float() / 2)
    assert hvd.grouped_reducescatter([], op=op) == []


def test_grouped_reducescatter_of_scalars_is_refused():
    for operation in (hvd.grouped_reducescatter, hvd.grouped_reducescatter_async):
        with pytest.raises(ValueError, match="Reducescatter does not support scalar inputs"):
            operation([torch.ones(2), torch.tensor(1.0)])


def sparse(rank, dtype=torch.float32):
    """Duplicate indices, and as many of them as the rank has: rank 0 has none."""
    indices = torch.tensor([[1, 1, rank, 4][:rank], [0, 0, 2, 1][:rank]])
    values = torch.arange(1, 1 + 2 * rank).reshape(rank, 2).to(dtype)
    return torch.sparse_coo_tensor(indices.reshape(2, rank), values, (5, 3, 2), check_invariants=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_sparse_allreduce(dtype):
    total = sum(sparse(rank, dtype).to_dense() for rank in range(hvd.size()))
    mine = sparse(hvd.rank(), dtype)
    wait = hvd.sparse_allreduce_async(mine, "s", hvd.Sum)
    other = hvd.sparse_allreduce_async(mine.coalesce(), name="t", op=hvd.Average, process_set=hvd.global_process_set)
    average = other()
    assert average.is_sparse
    expected = total / hvd.size() if dtype.is_floating_point else total // hvd.size()
    torch.testing.assert_close(average.to_dense(), expected)
    assert_same(wait().to_dense(), total)


def test_sparse_allreduce_of_nothing():
    nothing = torch.zeros(4, 3).to_sparse(1)
    result = hvd.sparse_allreduce_async(nothing, "nothing", hvd.Average)()
    assert result.shape == (4, 3)
    assert result._nnz() == 0


def test_sparse_allreduce_refuses_what_has_no_meaning():
    with pytest.raises(ValueError, match="op must be Average or Sum, got max"):
        hvd.sparse_allreduce_async(sparse(1), "a", hvd.Max)
    with pytest.raises(ValueError, match="must be in coordinate format"):
        hvd.sparse_allreduce_async(torch.ones(2), "a", hvd.Sum)


@pytest.mark.mpi(min_size=2)
def test_sparse_tensors_of_different_shapes_are_an_error_on_every_rank():
    is_odd = hvd.rank() == 1
    indices, values = torch.tensor([[0]]), torch.ones(1)
    for shape in ((4 + is_odd,), (4,)):
        mine = torch.sparse_coo_tensor(indices, values, shape, check_invariants=True)
        if shape == (4,) and is_odd:
            mine = torch.ones(4, 2).to_sparse(1)
        with pytest.raises(hvd.HorovodInternalError, match="Mismatched"):
            hvd.sparse_allreduce_async(mine, "a", hvd.Sum)()
    assert hvd.allreduce(torch.ones(1), op=hvd.Sum).item() == hvd.size()


@pytest.mark.mpi(min_size=3)
def test_groups_and_sparse_tensors_of_a_process_set():
    pair = hvd.add_process_set([0, hvd.size() - 1])
    if pair.included():
        mine = torch.full((2, 2), float(pair.rank()))
        assert_same(hvd.grouped_allgather([mine], process_set=pair)[0], torch.tensor([[0.0] * 2] * 2 + [[1.0] * 2] * 2))
        assert_same(hvd.grouped_reducescatter([mine], op=hvd.Sum, process_set=pair)[0], torch.ones(1, 2))
        average = hvd.sparse_allreduce_async(mine.to_sparse(), "s", hvd.Average, pair)()
        assert_same(average.to_dense(), torch.full((2, 2), 0.5))
    assert hvd.remove_process_set(pair)
