"""pack_segments and unpack_segments beside their twins, and the table that is sent only when it has changed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpitrain.memory import DTYPES, twins
from mpitrain.memory.device.kernels import TILE, SegmentTable
from tests.support.placed import Placed, random_elements, same_numbers

torch = pytest.importorskip("torch")

FLOATS = ["float16", "bfloat16", "float32", "float64"]
COUNTS = st.one_of(st.integers(0, 40), st.sampled_from([TILE - 1, TILE, TILE + 1, 2 * TILE + 5]))


class Layout:
    """Tensors at any address, and a bucket with gaps between them."""

    def __init__(self, cupy, rng, tensor_dtype, bucket_dtype, counts, shifts, gaps):
        self.tensors = [
            Placed(cupy, random_elements(rng, tensor_dtype, count), shift)
            for count, shift in zip(counts, shifts, strict=True)
        ]
        sizes = [count + gap for count, gap in zip(counts, gaps, strict=True)]
        self.offsets = [int(offset) for offset in np.cumsum([0, *sizes])[:-1]]
        self.bucket = Placed(cupy, random_elements(rng, bucket_dtype, sum(sizes)), int(rng.integers(0, 4)))
        self.dtypes = {"tensor_dtype": DTYPES[tensor_dtype], "bucket_dtype": DTYPES[bucket_dtype]}
        self.table = SegmentTable(counts, self.offsets, **self.dtypes)

    def run(self, direction, scale):
        """Run the kernel; return what the twin makes of the same: tensors and bucket."""
        tensors = [each.array.copy() for each in self.tensors]
        bucket = self.bucket.array.copy()
        twin = {"pack": twins.pack_segments, "unpack": twins.unpack_segments}[direction]
        twin(tensors, bucket, self.offsets, scale=scale, **self.dtypes)
        launch = getattr(self.table, direction)
        launch([each.address for each in self.tensors], self.bucket.address, scale=scale)
        return tensors, bucket

    def check(self, tensors, bucket):
        names = {key: dtype.name for key, dtype in self.dtypes.items()}
        for each, expected in zip(self.tensors, tensors, strict=True):
            each.check_surroundings()
            assert same_numbers(each.array, expected, names["tensor_dtype"])
        self.bucket.check_surroundings()
        assert same_numbers(self.bucket.array, bucket, names["bucket_dtype"])


@pytest.mark.parametrize("direction", ["pack", "unpack"])
@pytest.mark.parametrize("bucket_dtype", FLOATS)
@pytest.mark.parametrize("tensor_dtype", FLOATS)
@settings(max_examples=10)
@given(data=st.data())
def test_kernel_and_twin_agree(cupy, tensor_dtype, bucket_dtype, direction, data):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32), label="seed"))
    counts = data.draw(st.lists(COUNTS, max_size=6), label="counts")
    are_aligned = data.draw(st.booleans(), label="aligned")
    shifts = [0 if are_aligned else int(shift) for shift in rng.integers(0, 8, len(counts))]
    gaps = [-count % 8 if are_aligned else int(gap) for count, gap in zip(counts, rng.integers(0, 5, 6), strict=False)]
    layout = Layout(cupy, rng, tensor_dtype, bucket_dtype, counts, shifts, gaps)
    expected = layout.run(direction, data.draw(st.sampled_from([1.0, 0.25, 1 / 3, -1e5]), label="scale"))
    cupy.cuda.get_current_stream().synchronize()
    layout.check(*expected)


@pytest.mark.parametrize("bucket_dtype", FLOATS)
@pytest.mark.parametrize("tensor_dtype", FLOATS)
def test_cast_is_that_of_torch(tensor_dtype, bucket_dtype):
    dtypes = {"tensor_dtype": DTYPES[tensor_dtype], "bucket_dtype": DTYPES[bucket_dtype]}
    tensor = random_elements(np.random.default_rng(3), tensor_dtype, 3000)
    bucket = random_elements(np.random.default_rng(4), bucket_dtype, 3000)
    twins.pack_segments([tensor], bucket, [0], **dtypes)
    as_torch = torch.from_numpy(tensor.view(np.int16 if tensor_dtype == "bfloat16" else tensor.dtype))
    cast = as_torch.view(getattr(torch, tensor_dtype)).to(getattr(torch, bucket_dtype))
    expected = cast.view(torch.int16).numpy().view(np.uint16) if bucket_dtype == "bfloat16" else cast.numpy()
    assert same_numbers(bucket, expected, bucket_dtype)


def test_table_is_sent_when_an_address_changes(cupy, monkeypatch):
    rng = np.random.default_rng(1)
    layout = Layout(cupy, rng, "float32", "bfloat16", [100, 0, 5000], [0, 1, 2], [4, 0, 3])
    sent = []
    copy = cupy.cuda.runtime.memcpyAsync
    monkeypatch.setattr(
        cupy.cuda.runtime, "memcpyAsync", lambda *arguments: [sent.append(arguments[2]), copy(*arguments)]
    )
    for direction in ("pack", "unpack", "pack"):
        expected = layout.run(direction, 0.5)
        cupy.cuda.get_current_stream().synchronize()
        layout.check(*expected)
    assert sent == [3 * 40]
    # Moved by one element, the tensor is aligned otherwise, too.
    layout.tensors[2] = Placed(cupy, random_elements(rng, "float32", 5000), 3)
    layout.check(*[*layout.run("pack", 2.0), cupy.cuda.get_current_stream().synchronize()][:2])
    assert len(sent) == 2
    layout.bucket = Placed(cupy, layout.bucket.array, 1)
    layout.check(*[*layout.run("pack", 3.0), cupy.cuda.get_current_stream().synchronize()][:2])
    assert len(sent) == 3


def test_launches_before_keep_the_table_that_they_were_given(cupy):
    """The table of the second launch must not reach the device, or the pinned memory, before the first has its own."""
    rng = np.random.default_rng(2)
    counts = [100, 200]
    first, second = (Layout(cupy, rng, "float32", "float32", counts, [0, 0], [0, 0]) for _ in range(2))
    second.table = first.table
    expected = first.run("pack", 1.0), second.run("pack", 1.0)
    cupy.cuda.get_current_stream().synchronize()
    first.check(*expected[0])
    second.check(*expected[1])


def test_nothing_is_launched_for_nothing(cupy, monkeypatch):
    monkeypatch.setattr(cupy, "RawModule", None)
    float32 = DTYPES["float32"]
    SegmentTable([], [], tensor_dtype=float32, bucket_dtype=float32).pack([], 0)
    SegmentTable([0], [0], tensor_dtype=float32, bucket_dtype=float32).unpack([0], 0)


def test_arguments_are_checked(cupy):
    float32 = DTYPES["float32"]
    with pytest.raises(ValueError, match=r"^offsets: must be one for each tensor, got 1 for 2; pass all"):
        SegmentTable([1, 2], [0], tensor_dtype=float32, bucket_dtype=float32)
    with pytest.raises(TypeError, match=r"^dtype: must be a floating-point type, got int32; convert to float32"):
        SegmentTable([1], [0], tensor_dtype=DTYPES["int32"], bucket_dtype=float32)
    table = SegmentTable([1], [0], tensor_dtype=float32, bucket_dtype=float32)
    data = Placed(cupy, np.ones(4, np.float32))
    with pytest.raises(ValueError, match=r"^tensors: must be as many as in the table, 1, got 2; pass all"):
        table.pack([data.address] * 2, data.address)
    table.pack([data.address], data.address + 4)
    with pytest.raises(ValueError, match=r"^stream: must be the one of the first launch, 0x0, got 0x"):
        table.pack([data.address], data.address + 4, stream=cupy.cuda.Stream(non_blocking=True))
    cupy.cuda.get_current_stream().synchronize()
