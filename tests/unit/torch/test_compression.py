"""What travels, and what comes back."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from mpitrain.torch.compression import Compression  # noqa: E402

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
OTHERS = [torch.int64, torch.uint8, torch.bool, torch.complex64]
METHODS = {"none": None, "fp16": torch.float16, "bf16": torch.bfloat16}


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("method", METHODS)
def test_floats_travel_in_the_dtype_of_the_method_and_come_back_in_their_own(method, dtype):
    compressor = getattr(Compression, method)
    tensor = torch.tensor([[1.5, -2.0], [0.0, 0.25]], dtype=dtype)
    compressed, context = compressor.compress(tensor)
    assert compressed.dtype == (METHODS[method] or dtype)
    restored = compressor.decompress(compressed, context)
    assert restored.dtype == dtype
    assert torch.equal(restored, tensor)


@pytest.mark.parametrize("dtype", OTHERS)
@pytest.mark.parametrize("method", METHODS)
def test_what_is_no_float_travels_as_it_is(method, dtype):
    compressor = getattr(Compression, method)
    tensor = torch.tensor([1, 0, 3]).to(dtype)
    compressed, context = compressor.compress(tensor)
    assert compressed is tensor
    assert compressor.decompress(compressed, context) is tensor


def test_numbers_are_rounded_to_what_travels():
    compressed, context = Compression.fp16.compress(torch.tensor([1.0001, 1e6]))
    assert Compression.fp16.decompress(compressed, context).tolist() == [1.0, float("inf")]
