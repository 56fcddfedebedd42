"""Every operation of the face, over dtypes, shapes and forms; expected values are written down, not reduced."""

from __future__ import annotations

import random
import time

import pytest

torch = pytest.importorskip("torch")

import mpitrain.torch as hvd  # noqa: E402
from tests.support.limits import HANG_S  # noqa: E402

INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64]
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
SHAPES = [(), (0,), (1,), (7,), (2, 3), (0, 4), (33, 5)]


@pytest.fixture(scope="module", autouse=True)
def _initialized():
    hvd.init()
    yield
    hvd.shutdown()


def values(rank, shape, dtype):
    """Small whole numbers that differ by rank and index, so that sums are exact in every dtype."""
    count = 1
    for length in shape:
        count *= length
    return torch.tensor([(index + 2 * rank) % 5 for index in range(count)], dtype=dtype).reshape(shape)


def everybodys(shape, dtype):
    return [values(rank, shape, dtype).to(torch.float64) for rank in range(hvd.size())]


def total(shape, dtype):
    return sum(everybodys(shape, dtype)).to(dtype)


def assert_equal(result, expected):
    assert result.dtype == expected.dtype
    assert result.shape == expected.shape
    assert torch.equal(result.to(torch.float64), expected.to(torch.float64)), (result, expected)


@pytest.mark.parametrize("dtype", INTEGERS + FLOATS)
def test_allreduce_sums_every_dtype_and_shape(dtype):
    for shape in SHAPES:
        mine = values(hvd.rank(), shape, dtype)
        kept = mine.clone()
        assert_equal(hvd.allreduce(mine, op=hvd.Sum), total(shape, dtype))
        assert_equal(mine, kept)
        assert hvd.allreduce_(mine, op=hvd.Sum) is mine
        assert_equal(mine, total(shape, dtype))


@pytest.mark.parametrize("dtype", INTEGERS + FLOATS)
def test_allgather_broadcast_and_alltoall_move_every_dtype(dtype):
    size, rank = hvd.size(), hvd.rank()
    mine = values(rank, (size, 3), dtype)
    everything = torch.cat([values(source, (size, 3), dtype).to(torch.float64) for source in range(size)])
    assert_equal(hvd.allgather(mine), everything.to(dtype))
    assert_equal(hvd.broadcast(mine, size - 1), values(size - 1, (size, 3), dtype))
    columns = torch.stack([values(source, (size, 3), dtype).to(torch.float64)[rank] for source in range(size)])
    assert_equal(hvd.alltoall(mine), columns.to(dtype))


@pytest.mark.parametrize(("op", "reduce"), [(hvd.Min, torch.amin), (hvd.Max, torch.amax), (hvd.Product, torch.prod)])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, *FLOATS])
def test_other_reductions(op, reduce, dtype):
    stacked = torch.stack(everybodys((7,), dtype))
    assert_equal(hvd.allreduce(values(hvd.rank(), (7,), dtype), op=op), reduce(stacked, 0).to(dtype))


def test_bool_is_reduced_as_logic_and_has_no_average():
    mine = torch.tensor([hvd.rank() == 0, True, False])
    is_alone = hvd.size() == 1
    assert hvd.allreduce(mine, op=hvd.Sum).tolist() == [True, True, False]
    assert hvd.allreduce(mine, op=hvd.Max).tolist() == [True, True, False]
    assert hvd.allreduce(mine, op=hvd.Min).tolist() == [is_alone, True, False]
    assert hvd.allreduce(mine, op=hvd.Product).tolist() == [is_alone, True, False]
    with pytest.raises(ValueError, match=r"BoolTensor is not supported: op: average is not defined for this dtype"):
        hvd.allreduce(mine)
    with pytest.raises(ValueError, match="bool cannot be scaled"):
        hvd.allreduce(mine, op=hvd.Sum, postscale_factor=2.0)
    assert hvd.allgather(mine[:1]).tolist() == [rank == 0 for rank in range(hvd.size())]
    assert hvd.broadcast(mine, 0).tolist() == [True, True, False]


def test_average_is_the_default_and_of_integers_truncated_toward_zero():
    size, rank = hvd.size(), hvd.rank()
    floats = hvd.allreduce(torch.tensor([float(rank), -1.0]))
    torch.testing.assert_close(floats, torch.tensor([(size - 1) / 2, -1.0]))
    on_last = rank == size - 1
    for dtype in (torch.int8, torch.int32, torch.int64):
        mine = torch.tensor([2 * size - 1, 1 - 2 * size, 3 * size], dtype=dtype) * on_last
        truncated = [int((2 * size - 1) / size), -int((2 * size - 1) / size), 3]
        assert hvd.allreduce(mine, op=hvd.Average).tolist() == truncated


def test_zero_dimensional_metric():
    result = hvd.allreduce(torch.tensor(0.5 + hvd.rank()), name="loss")
    assert result.shape == ()
    assert result.item() == pytest.approx(0.5 + (hvd.size() - 1) / 2)


def test_factors_before_and_after():
    size, rank = hvd.size(), hvd.rank()
    mine = torch.full((4,), float(rank + 1))
    expected = torch.full((4,), size * (size + 1) / 2 * 0.5 * 4.0)
    assert_equal(hvd.allreduce(mine, op=hvd.Sum, prescale_factor=0.5, postscale_factor=4.0), expected)
    # Factors may be whole numbers, and the prescaled integers are truncated before the sum.
    ints = torch.tensor([3, -3])
    assert hvd.allreduce(ints, op=hvd.Sum, prescale_factor=0.5).tolist() == [size, -size]
    assert hvd.allreduce(ints, op=hvd.Sum, postscale_factor=2).tolist() == [6 * size, -6 * size]
    averaged = hvd.allreduce(mine, op=hvd.Average, postscale_factor=2)
    torch.testing.assert_close(averaged, torch.full((4,), float(size + 1)))
    halves = torch.full((2,), 3.0, dtype=torch.bfloat16)
    assert_equal(hvd.allreduce(halves, op=hvd.Max, prescale_factor=0.5), halves / 2)


def test_average_argument_is_deprecated_and_excludes_op():
    mine = torch.full((2,), float(hvd.rank()))
    size = hvd.size()
    for average, expected in ((True, (size - 1) / 2), (False, size * (size - 1) / 2)):
        with pytest.warns(DeprecationWarning, match="`average` has been replaced with `op`") as caught:
            result = hvd.allreduce(mine, average=average)
        assert len(caught) == 1
        torch.testing.assert_close(result, torch.full((2,), expected))
    with pytest.raises(ValueError, match="The op parameter supersedes average"):
        hvd.allreduce(mine, average=True, op=hvd.Sum)


def test_the_warning_is_about_the_line_of_the_caller():
    mine = torch.ones(2)
    calls = (
        lambda: hvd.allreduce(mine, average=False),
        lambda: hvd.allreduce_(mine.clone(), average=False),
        lambda: hvd.synchronize(hvd.allreduce_async(mine, average=False)),
        lambda: hvd.synchronize(hvd.allreduce_async_(mine.clone(), average=False)),
        lambda: hvd.grouped_allreduce([mine], average=False)[0],
        lambda: hvd.grouped_allreduce_([mine.clone()], average=False)[0],
        lambda: hvd.synchronize(hvd.grouped_allreduce_async([mine], average=False))[0],
        lambda: hvd.synchronize(hvd.grouped_allreduce_async_([mine.clone()], average=False))[0],
    )
    for call in calls:
        with pytest.warns(DeprecationWarning, match="`average` has been replaced") as caught:
            result = call()
        assert [warning.filename for warning in caught] == [__file__]
        assert_equal(result, mine * hvd.size())


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_complex_numbers(dtype):
    size, rank = hvd.size(), hvd.rank()
    mine = torch.tensor([1 + 2j, -3j], dtype=dtype) * (rank + 1)
    total = torch.tensor([1 + 2j, -3j], dtype=dtype) * (size * (size + 1) / 2)
    torch.testing.assert_close(hvd.allreduce(mine, op=hvd.Sum), total)
    torch.testing.assert_close(hvd.allreduce(mine, op=hvd.Average, prescale_factor=2.0), total * 2 / size)
    assert torch.equal(
        hvd.allgather(mine[:1]), torch.tensor([(1 + 2j) * (each + 1) for each in range(size)], dtype=dtype)
    )
    assert torch.equal(hvd.broadcast(mine, 0), mine / (rank + 1))
    with pytest.raises(ValueError, match="max is not defined for this dtype, got complex"):
        hvd.allreduce(mine, op=hvd.Max)


@pytest.mark.mpi(min_size=3)
def test_every_operation_takes_a_name_factors_and_a_process_set():
    pair = hvd.add_process_set([0, hvd.size() - 1])
    if pair.included():
        mine = torch.tensor([1.0, 2.0]) * (pair.rank() + 1)
        total = torch.tensor([3.0, 6.0])
        own = {"name": "a", "process_set": pair}
        factors = {"op": hvd.Sum, "prescale_factor": 2.0, "postscale_factor": 0.5, **own}
        for single in (
            hvd.allreduce(mine, **factors),
            hvd.allreduce_(mine.clone(), **factors),
            hvd.synchronize(hvd.allreduce_async(mine, **factors)),
            hvd.synchronize(hvd.allreduce_async_(mine.clone(), **factors)),
            *hvd.grouped_allreduce([mine], **factors),
            *hvd.grouped_allreduce_([mine.clone()], **factors),
            *hvd.synchronize(hvd.grouped_allreduce_async([mine], **factors)),
            *hvd.synchronize(hvd.grouped_allreduce_async_([mine.clone()], **factors)),
            torch.cat(hvd.grouped_allgather([hvd.reducescatter(mine, **factors)], **own)),
            hvd.allgather(hvd.synchronize(hvd.reducescatter_async(mine, **factors)), **own),
            hvd.allgather(hvd.grouped_reducescatter([mine], **factors)[0], **own),
            hvd.allgather(hvd.synchronize(hvd.grouped_reducescatter_async([mine], **factors))[0], **own),
        ):
            assert_equal(single, total)
        last = hvd.size() - 1
        for copied in (
            hvd.broadcast(mine, last, **own),
            hvd.broadcast_(mine.clone(), root_rank=last, **own),
            hvd.synchronize(hvd.broadcast_async(mine, last, **own)),
            hvd.synchronize(hvd.broadcast_async_(mine.clone(), last, **own)),
        ):
            assert_equal(copied, torch.tensor([2.0, 4.0]))
        everything = torch.tensor([1.0, 2.0, 2.0, 4.0])
        assert_equal(hvd.synchronize(hvd.allgather_async(mine, **own)), everything)
        assert_equal(hvd.synchronize(hvd.grouped_allgather_async([mine], **own))[0], everything)
        assert_equal(hvd.alltoall(mine, **own), everything[pair.rank() :: 2])
        output, received = hvd.synchronize(hvd.alltoall_async(mine, [2 - pair.rank(), pair.rank()], **own))
        assert_equal(output, torch.tensor([[1.0, 2.0, 2.0], [4.0]][pair.rank()]))
        assert received.tolist() == [[2, 1], [0, 1]][pair.rank()]
        hvd.barrier(process_set=pair)
    assert hvd.remove_process_set(pair)


def test_arguments_are_positional_as_in_horovod():
    size = hvd.size()
    ones = torch.ones(2)
    assert_equal(hvd.allreduce(ones, None, "a", hvd.Compression.fp16, hvd.Sum, 2.0, 3.0), 6 * size * ones)
    assert_equal(hvd.synchronize(hvd.allreduce_async(ones, None, "a", hvd.Sum, 2.0, 3.0)), 6 * size * ones)
    assert_equal(hvd.broadcast(ones, 0, "a"), ones)
    assert_equal(hvd.allgather(ones, "a"), torch.ones(2 * size))


def test_compressed_allreduce_has_the_dtype_of_the_input():
    for compression in (hvd.Compression.fp16, hvd.Compression.bf16, hvd.Compression.none):
        for dtype in (torch.float32, torch.float64, torch.int64):
            mine = values(hvd.rank(), (5,), dtype)
            assert_equal(hvd.allreduce(mine, op=hvd.Sum, compression=compression), total((5,), dtype))


def test_tensors_that_are_not_contiguous():
    size, rank = hvd.size(), hvd.rank()
    factor = size * (size + 1) // 2
    base = torch.arange(24.0).reshape(4, 6)
    for cut in (lambda t: t.T, lambda t: t[:, ::2], lambda t: t[:, 1], lambda t: t[1:3, 2:4]):
        mine = cut(base * (rank + 1))
        assert not mine.is_contiguous()
        assert_equal(hvd.allreduce(mine, op=hvd.Sum), cut(base) * factor)
        whole = base * (rank + 1)
        view = cut(whole)
        assert hvd.allreduce_(view, op=hvd.Sum) is view
        expected = base * (rank + 1)
        cut(expected).copy_(cut(base) * factor)
        assert_equal(whole, expected)
        assert_equal(hvd.broadcast(cut(base * (rank + 1)), 0), cut(base))
        whole = base * (rank + 1)
        view = cut(whole)
        assert hvd.broadcast_(view, 0) is view
        assert_equal(cut(whole), cut(base))
        assert_equal(hvd.allgather(cut(base * (rank + 1))), torch.cat([cut(base) * (r + 1) for r in range(size)]))
    images = (torch.arange(2.0 * 3 * 4 * 4).reshape(2, 3, 4, 4) * (rank + 1)).to(memory_format=torch.channels_last)
    expected = torch.arange(2.0 * 3 * 4 * 4).reshape(2, 3, 4, 4) * factor
    assert_equal(hvd.allreduce_(images, op=hvd.Sum), expected)
    assert images.is_contiguous(memory_format=torch.channels_last)


def test_tensors_that_require_grad():
    parameter = torch.nn.Parameter(torch.full((3,), float(hvd.rank())))
    expected = torch.full((3,), float(sum(range(hvd.size()))))
    assert_equal(hvd.allreduce(parameter, op=hvd.Sum).detach(), expected)
    assert hvd.allreduce_(parameter, op=hvd.Sum) is parameter
    assert_equal(parameter.detach(), expected)
    assert parameter.requires_grad
    assert hvd.broadcast_(parameter, 0) is parameter
    assert_equal(hvd.allgather(parameter).detach(), expected.repeat(hvd.size()))


@pytest.mark.parametrize("operation", ["allreduce_", "broadcast_", "grouped_allreduce_"])
def test_writing_in_place_is_seen_by_autograd(operation):
    weight = torch.ones(3, requires_grad=True)
    saved = torch.full((3,), 2.0)
    product = (weight * saved).sum()
    if operation == "allreduce_":
        hvd.allreduce_(saved, op=hvd.Sum)
    elif operation == "broadcast_":
        hvd.broadcast_(saved, 0)
    else:
        hvd.grouped_allreduce_([saved], op=hvd.Sum)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_grouped_allreduce_of_several_dtypes_and_shapes():
    shapes = [(3,), (), (2, 2), (0,), (100,)]
    dtypes = [torch.float32, torch.int64, torch.float32, torch.float64, torch.bfloat16]
    mine = [values(hvd.rank(), shape, dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
    kept = [tensor.clone() for tensor in mine]
    expected = [total(shape, dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
    forms = {
        "new": lambda: hvd.grouped_allreduce(mine, op=hvd.Sum, name="g"),
        "async": lambda: hvd.synchronize(hvd.grouped_allreduce_async(mine, op=hvd.Sum)),
    }
    for kind, form in forms.items():
        results = form()
        assert type(results) is (list if kind == "new" else tuple)
        for tensor, original, result, want in zip(mine, kept, results, expected, strict=True):
            assert_equal(result, want)
            assert_equal(tensor, original)
    for form in (hvd.grouped_allreduce_, lambda *a, **k: hvd.synchronize(hvd.grouped_allreduce_async_(*a, **k))):
        own = [tensor.clone() for tensor in kept]
        results = form(own, op=hvd.Sum)
        assert type(results) is tuple
        for tensor, result, want in zip(own, results, expected, strict=True):
            assert result is tensor
            assert_equal(result, want)
    halved = hvd.grouped_allreduce(kept[::2], op=hvd.Sum, compression=hvd.Compression.fp16)
    for result, want in zip(halved, expected[::2], strict=True):
        assert_equal(result, want)
    assert hvd.grouped_allreduce([]) == []


def test_allgather_with_different_first_dimensions():
    size, rank = hvd.size(), hvd.rank()
    # Rank 0 brings no rows at all.
    result = hvd.allgather(torch.full((rank, 2), float(rank)))
    assert_equal(result, torch.cat([torch.full((source, 2), float(source)) for source in range(size)]))
    assert hvd.allgather(torch.empty(0, 3)).shape == (0, 3)
    assert_equal(hvd.allgather(torch.tensor(rank)), torch.arange(size))
    large = hvd.allgather(torch.full((50_000 * (rank + 1),), rank))
    assert_equal(large, torch.repeat_interleave(torch.arange(size), 50_000 * torch.arange(1, size + 1)))


def test_alltoall_with_and_without_splits():
    size, rank = hvd.size(), hvd.rank()
    result = hvd.alltoall(torch.arange(size) + 10 * rank)
    assert_equal(result, torch.arange(size) * 10 + rank)
    # Rank r sends d rows to rank d, and one at the end to nobody.
    splits = torch.arange(size, dtype=torch.int32)
    rows = torch.repeat_interleave(torch.arange(size), torch.arange(size)) + 10 * rank
    mine = torch.cat([rows, torch.tensor([99])]).reshape(-1, 1).expand(-1, 2)
    for given in (splits, splits.to(torch.int64), splits.tolist()):
        output, received = hvd.alltoall(mine, splits=given)
        assert_equal(received, torch.full((size,), rank, dtype=torch.int32))
        expected = torch.cat([torch.full((rank, 2), 10 * source + rank) for source in range(size)])
        assert_equal(output, expected)
    pair = hvd.synchronize(hvd.alltoall_async(torch.zeros(size)))
    assert_equal(pair[1], torch.ones(size, dtype=torch.int32))


def test_alltoall_refuses_splits_that_do_not_fit():
    size = hvd.size()
    with pytest.raises(ValueError, match="Number of entries in splits does not equal number of workers"):
        hvd.alltoall(torch.zeros(4), splits=[1] * (size + 1))
    with pytest.raises(ValueError, match="Sum of splits entries is greater than the first dimension"):
        hvd.alltoall(torch.zeros(1), splits=[2] * size)
    with pytest.raises(ValueError, match="Sum of splits entries is greater"):
        hvd.alltoall(torch.zeros(size), splits=[-1] * size)
    with pytest.raises(ValueError, match="alltoall expects splits to contain 32-bit integer elements"):
        hvd.alltoall(torch.zeros(4), splits=torch.ones(size))
    with pytest.raises(ValueError, match="dimension"):
        hvd.alltoall(torch.tensor(1.0))
    if size > 1:
        with pytest.raises(ValueError, match="splits not provided, but first dimension of tensor is not an even"):
            hvd.alltoall(torch.zeros(size + 1))


def test_reducescatter_even_and_uneven():
    size, rank = hvd.size(), hvd.rank()
    for rows in (0, 1, size, 2 * size + 1, 101):
        whole = torch.arange(rows * 3.0).reshape(rows, 3)
        parts = torch.tensor_split(whole, size)
        averaged = hvd.reducescatter(whole * (rank + 1))
        torch.testing.assert_close(averaged, parts[rank] * (size + 1) / 2)
        assert_equal(hvd.reducescatter(whole * (rank + 1), op=hvd.Sum), parts[rank] * (size * (size + 1) // 2))
        handle = hvd.reducescatter_async(whole, op=hvd.Sum, prescale_factor=2, postscale_factor=0.5)
        assert_equal(hvd.synchronize(handle), parts[rank] * size)
        assert_equal(hvd.reducescatter(whole + rank, op=hvd.Max), parts[rank] + size - 1)
    with pytest.raises(ValueError, match="Reducescatter does not support scalar inputs"):
        hvd.reducescatter(torch.tensor(1.0))


@pytest.mark.parametrize("shape", SHAPES)
def test_broadcast_from_every_root(shape):
    for root in range(hvd.size()):
        mine = values(hvd.rank(), shape, torch.float32)
        expected = values(root, shape, torch.float32)
        kept = mine.clone()
        assert_equal(hvd.broadcast(mine, root), expected)
        assert_equal(mine, kept)
        assert hvd.broadcast_(mine, root) is mine
        assert_equal(mine, expected)
        other = values(hvd.rank(), shape, torch.float32)
        assert hvd.synchronize(hvd.broadcast_async_(other, root)) is other
        assert_equal(hvd.synchronize(hvd.broadcast_async(other, root)), expected)


def test_handles_in_opposite_order():
    rank, size = hvd.rank(), hvd.size()
    order = range(30) if rank % 2 else range(29, -1, -1)
    handles = {index: start_any(index) for index in order}
    for index in sorted(handles, reverse=rank % 2 == 0):
        assert_equal(hvd.synchronize(handles[index]), expected_any(index, size))


def test_random_orders_with_delays():
    draw = random.Random(hvd.rank())
    for _ in range(5):
        order = list(range(20))
        draw.shuffle(order)
        handles = {}
        for index in order:
            if draw.random() < 0.3:
                time.sleep(draw.random() * 2e-3)
            handles[index] = start_any(index)
        draw.shuffle(order)
        for index in order:
            assert_equal(hvd.synchronize(handles[index]), expected_any(index, hvd.size()))


def start_any(index):
    mine = torch.full((index * 10,), float(hvd.rank() + index))
    if index % 3 == 0:
        return hvd.allreduce_async(mine, op=hvd.Sum, name=f"n{index}")
    if index % 3 == 1:
        return hvd.allgather_async(mine[: 2 * hvd.rank()], name=f"n{index}")
    return hvd.broadcast_async(mine, 0, name=f"n{index}")


def expected_any(index, size):
    if index % 3 == 0:
        return torch.full((index * 10,), float(sum(rank + index for rank in range(size))))
    if index % 3 == 1:
        return torch.cat([torch.full((2 * rank,), float(rank + index)) for rank in range(size)])
    return torch.full((index * 10,), float(index))


def test_large_tensors_run_by_schedules():
    mine = torch.full((300_000,), float(hvd.rank() + 1))
    handles = [hvd.allreduce_async(mine * index, op=hvd.Sum, name=f"{index}") for index in range(6)]
    for index, handle in enumerate(handles):
        assert_equal(hvd.synchronize(handle), mine / (hvd.rank() + 1) * index * sum(range(hvd.size() + 1)))


def test_poll_turns_true_by_itself():
    handle = hvd.allreduce_async(torch.ones(1000), name="polled")
    deadline_s = time.monotonic() + HANG_S
    while not hvd.poll(handle):
        assert time.monotonic() < deadline_s
        time.sleep(1e-4)
    assert_equal(hvd.synchronize(handle), torch.ones(1000))


def test_unknown_handles():
    handle = hvd.allreduce_async(torch.ones(1))
    hvd.synchronize(handle)
    assert hvd.synchronize(handle) is None
    assert hvd.synchronize(10**9) is None
    with pytest.raises(ValueError, match="handle: unknown"):
        hvd.poll(handle)


def test_barrier_waits_for_all():
    for late in range(hvd.size()):
        if hvd.rank() == late:
            time.sleep(0.05)
        entered_s = time.monotonic()
        hvd.barrier()
        left_s = time.monotonic()
        # One host, one clock.
        assert left_s >= max(hvd.allgather_object(entered_s))


def test_operations_of_different_kinds_may_share_a_name():
    handles = [
        hvd.allreduce_async(torch.ones(2), name="same", op=hvd.Sum),
        hvd.allgather_async(torch.ones(2), name="same"),
        hvd.broadcast_async(torch.ones(2), 0, name="same"),
    ]
    lengths = [len(hvd.synchronize(handle)) for handle in handles]
    assert lengths == [2, 2 * hvd.size(), 2]


def test_unnamed_operations_are_matched_by_their_order():
    handles = [hvd.allreduce_async(torch.tensor([float(index)]), op=hvd.Sum) for index in range(50)]
    for index, handle in reversed(list(enumerate(handles))):
        assert hvd.synchronize(handle).item() == index * hvd.size()


@pytest.mark.mpi(min_size=2)
def test_name_in_flight_is_refused_and_the_first_completes():
    if hvd.rank() == 0:
        handle = hvd.allreduce_async(torch.ones(2), name="twice", op=hvd.Sum)
        with pytest.raises(ValueError, match="same name as another tensor that is currently being processed"):
            hvd.allreduce_async(torch.ones(2), name="twice", op=hvd.Sum)
        hvd.barrier()
    else:
        hvd.barrier()
        handle = hvd.allreduce_async(torch.ones(2), name="twice", op=hvd.Sum)
    assert hvd.synchronize(handle).tolist() == [hvd.size()] * 2
    assert hvd.allreduce(torch.ones(2), name="twice", op=hvd.Sum).tolist() == [hvd.size()] * 2
