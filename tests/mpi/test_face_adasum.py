"""`hvd.Adasum` on tensors: every float, in groups, on process sets, and what it refuses."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

import mpitrain.torch as hvd  # noqa: E402
from tests.support.adasum import adasum  # noqa: E402

# Relative to what is brought, as each combination of two ranks rounds to the dtype.
TOLERANCES = {torch.float64: 1e-14, torch.float32: 1e-6, torch.float16: 5e-3, torch.bfloat16: 4e-2}


@pytest.fixture(scope="module", autouse=True)
def _initialized():
    hvd.init()
    yield
    hvd.shutdown()


def gradient(rank, shape, dtype=torch.float32):
    """Differs by rank and index, with a direction that all ranks share."""
    index = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    values = torch.sin(index * 0.37 + 1) * (1 + rank % 3) + torch.cos(index * (rank + 1) * 0.9 + rank)
    return values.reshape(shape).to(dtype)


def expected(shape, dtype=torch.float32, ranks=None):
    ranks = range(hvd.size()) if ranks is None else ranks
    return torch.from_numpy(adasum([gradient(rank, shape, dtype).double().numpy() for rank in ranks]))


def assert_close(result, want):
    tolerance = TOLERANCES[result.dtype]
    torch.testing.assert_close(result.double(), want, rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_allreduce_of_every_float_and_shape(dtype):
    assert int(hvd.Adasum) == 2
    for shape in [(1,), (7,), (33, 5), (0,), (300_001,)]:
        mine = gradient(hvd.rank(), shape, dtype)
        kept = mine.clone()
        result = hvd.allreduce(mine, op=hvd.Adasum)
        assert result.dtype == dtype
        assert torch.equal(mine, kept)
        assert_close(result, expected(shape, dtype))
        assert hvd.allreduce_(mine, op=hvd.Adasum) is mine
        assert torch.equal(mine, result)
        # The same bits on every rank, or models would drift apart.
        assert torch.equal(hvd.broadcast(result, 0), result)
    scalar = hvd.allreduce(torch.tensor(0.5 + hvd.rank(), dtype=dtype), op=hvd.Adasum)
    assert scalar.shape == ()
    # Numbers are parallel vectors: the Adasum of two of one sign is their average.
    want = adasum([torch.tensor([0.5 + rank], dtype=torch.float64).numpy() for rank in range(hvd.size())])
    assert scalar.item() == pytest.approx(want[0], abs=4 * TOLERANCES[dtype])


def test_each_tensor_of_a_group_and_of_those_fused_is_combined_by_itself():
    shapes = [(3,), (2, 2), (0,), (100,), (1,), (5,)]
    dtypes = [torch.float32, torch.float64, torch.float32, torch.float32, torch.float64, torch.float16]
    mine = [gradient(hvd.rank(), shape, dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
    handles = [
        hvd.allreduce_async(tensor, name=f"{index}", op=hvd.Adasum, prescale_factor=2.0, postscale_factor=0.25)
        for index, tensor in enumerate(mine)
    ]
    grouped = hvd.grouped_allreduce(mine, op=hvd.Adasum)
    for handle, result, shape, dtype in zip(handles, grouped, shapes, dtypes, strict=True):
        assert_close(result, expected(shape, dtype))
        # The sum of multiples is the multiple of the sum.
        assert_close(hvd.synchronize(handle), expected(shape, dtype) / 2)


def test_what_has_no_meaning_is_refused_on_every_rank():
    with pytest.raises(ValueError, match="adasum needs a floating-point dtype, got int64"):
        hvd.allreduce(torch.ones(3, dtype=torch.int64), op=hvd.Adasum)
    with pytest.raises(ValueError, match="Reducescatter does not support Adasum"):
        hvd.reducescatter(torch.ones(3), op=hvd.Adasum)
    assert_close(hvd.allreduce(gradient(hvd.rank(), (3,)), op=hvd.Adasum), expected((3,)))


@pytest.mark.mpi(min_size=2)
def test_on_a_process_set():
    ranks = list(range(1, hvd.size()))
    part = hvd.add_process_set(ranks)
    if part.included():
        result = hvd.allreduce(gradient(hvd.rank(), (11,)), op=hvd.Adasum, process_set=part)
        assert_close(result, expected((11,), ranks=ranks))
    assert hvd.remove_process_set(part)
