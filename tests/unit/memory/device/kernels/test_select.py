"""select_values beside its twin: order, capacity and what stays in the residual."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpitrain.memory import DTYPES, twins
from mpitrain.memory.device.kernels import THREADS, TILE, places_count, select_values
from mpitrain.memory.device.kernels.loader import launch
from mpitrain.memory.device.kernels.variants import select_variant
from tests.support.placed import Placed, random_elements, same_numbers

FLOATS = ["float16", "bfloat16", "float32", "float64"]
# Around a block and a tile.
COUNTS = st.one_of(st.integers(1, 40), st.sampled_from([THREADS, TILE - 1, TILE, TILE + 1, 3 * TILE + 33]))


def wide_of(dtype):
    return "float64" if dtype == "float64" else "float32"


def select_both(cupy, elements, residual, *, threshold, capacity, dtype):
    """Return total, indices, values and residual of the kernel and of the twin."""
    count = elements.size
    arrays = [elements, residual.copy(), np.full(capacity, -1, np.int32), np.zeros(capacity, elements.dtype)]
    options = {"threshold": threshold, "dtype": DTYPES[dtype]}
    placed = [Placed(cupy, array, 1) for array in arrays]
    total, places = (Placed(cupy, np.zeros(size, np.int32)) for size in (1, places_count(count)))
    addresses = [each.address for each in (*placed, total)]
    select_values(*addresses, places=places.address, count=count, capacity=capacity, **options)
    expected = twins.select_values(*arrays, **options)
    cupy.cuda.get_current_stream().synchronize()
    for each in (*placed, total, places):
        each.check_surroundings()
    assert np.array_equal(placed[0].array.view(np.uint8), elements.view(np.uint8))
    kernel = int(total.array[0]), placed[2].array, placed[3].array, placed[1].array
    return kernel, (expected, arrays[2], arrays[3], arrays[1])


@pytest.mark.parametrize("dtype", FLOATS)
@settings(max_examples=12)
@given(data=st.data())
def test_kernel_and_twin_agree(cupy, dtype, data):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32), label="seed"))
    count = data.draw(COUNTS, label="count")
    elements = random_elements(rng, dtype, count, special=data.draw(st.booleans(), label="special"))
    residual = random_elements(rng, wide_of(dtype), count, special=False)
    capacity = data.draw(st.sampled_from([0, 1, count // 3, count]), label="capacity")
    threshold = data.draw(st.sampled_from([0.0, 1e-3, 1.0, 100.0, 1e30]), label="threshold")
    kernel, twin = select_both(cupy, elements, residual, threshold=threshold, capacity=capacity, dtype=dtype)
    assert kernel[0] == twin[0]
    assert np.array_equal(kernel[1], twin[1])
    assert same_numbers(kernel[2], twin[2], dtype)
    assert same_numbers(kernel[3], twin[3], wide_of(dtype))


@pytest.mark.parametrize("num_tiles", [1, THREADS - 1, THREADS, THREADS + 1, 3 * THREADS + 5])
def test_places_of_tiles_are_the_sums_of_those_before(cupy, num_tiles):
    counts = np.random.default_rng(num_tiles).integers(0, TILE + 1, num_tiles, np.int32)
    places, total = Placed(cupy, counts), Placed(cupy, np.zeros(1, np.int32))
    arguments = (places.address, np.int64(num_tiles), total.address)
    launch(select_variant(DTYPES["float32"]), "select_values_places", 1, arguments)
    cupy.cuda.get_current_stream().synchronize()
    places.check_surroundings()
    total.check_surroundings()
    assert places.array.tolist() == [0, *np.cumsum(counts)[:-1]]
    assert total.array.tolist() == [counts.sum()]


@pytest.mark.parametrize("dtype", FLOATS)
def test_what_is_sent_and_what_is_kept_add_up(cupy, dtype):
    rng = np.random.default_rng(2)
    elements = random_elements(rng, dtype, 5000, special=False)
    residual = random_elements(rng, wide_of(dtype), 5000, special=False)
    exact = residual.astype(np.float64)
    numbers = np.zeros(5000, wide_of(dtype))
    wide = {"tensor_dtype": DTYPES[dtype], "bucket_dtype": DTYPES[wide_of(dtype)]}
    twins.pack_segments([elements], numbers, [0], **wide)
    exact += numbers
    for total, indices, values, rest in select_both(cupy, elements, residual, threshold=2.0, capacity=300, dtype=dtype):
        assert total > 300
        sent = np.zeros(300, wide_of(dtype))
        twins.pack_segments([values], sent, [0], **wide)
        received = np.zeros(5000)
        received[indices] = sent
        assert np.allclose(received + rest, exact, rtol=1e-6, atol=0)
        if DTYPES[dtype].itemsize > 2:
            assert not rest[indices].any()
        # The ones after the last that had room are kept whole.
        assert (np.abs(rest[indices[-1] + 1 :]) >= 2.0).sum() == total - 300


def test_overflow_is_sent_and_forgotten(cupy):
    elements = np.array([1, np.inf, 2, np.nan, -np.inf], np.float32)
    for total, indices, values, residual in select_both(
        cupy, elements, np.zeros_like(elements), threshold=5.0, capacity=5, dtype="float32"
    ):
        assert total == 3
        assert indices.tolist() == [1, 3, 4, -1, -1]
        assert repr(values[:3].tolist()) == "[inf, nan, -inf]"
        assert residual.tolist() == [1, 0, 2, 0, 0]


@pytest.mark.parametrize("count", [0, 2**31])
def test_count_is_checked(cupy, count):
    with pytest.raises(ValueError, match=rf"^count: must be 1 to {2**31 - 1}, got {count}; select from parts"):
        select_values(0, 0, 0, 0, 0, places=0, count=count, capacity=0, threshold=1.0, dtype=DTYPES["float32"])
