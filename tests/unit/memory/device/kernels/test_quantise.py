"""quantise_blocks and dequantise_blocks beside their twins, and what error feedback has to keep."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpitrain.memory import DTYPES, twins
from mpitrain.memory.device.kernels import dequantise_blocks, quantise_blocks
from mpitrain.memory.twins import QUANTA
from tests.support.placed import Placed, random_elements, same_numbers

SMALL_FLOATS = ["float16", "bfloat16", "float32"]
# A block takes eight times QUANTA at once.
COUNTS = st.one_of(st.integers(0, 40), st.integers(200, 1500), st.just(20 * QUANTA + 3))


def num_scales(count):
    return -(-count // QUANTA)


def quantise_both(cupy, elements, residual, dtype, shift=0):
    """Return codes, scales and residual of the kernel and of the twin."""
    count = elements.size
    arrays = [elements, residual.copy(), np.full(count, 99, np.int8), np.full(num_scales(count), 7, np.float32)]
    placed = [Placed(cupy, array, shift) for array in arrays]
    quantise_blocks(*[each.address for each in placed], count=count, dtype=DTYPES[dtype])
    twins.quantise_blocks(*arrays, dtype=DTYPES[dtype])
    cupy.cuda.get_current_stream().synchronize()
    for each in placed:
        each.check_surroundings()
    assert np.array_equal(placed[0].array.view(np.uint8), elements.view(np.uint8))
    return (placed[2].array, placed[3].array, placed[1].array), (arrays[2], arrays[3], arrays[1])


@pytest.mark.parametrize("dtype", SMALL_FLOATS)
@settings(max_examples=25)
@given(data=st.data())
def test_quantising_kernel_and_twin_agree(cupy, dtype, data):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32), label="seed"))
    count = data.draw(COUNTS, label="count")
    is_special = data.draw(st.booleans(), label="special")
    elements = random_elements(rng, dtype, count, special=is_special)
    residual = random_elements(rng, "float32", count, special=False)
    kernel, twin = quantise_both(cupy, elements, residual, dtype, data.draw(st.integers(0, 3), label="shift"))
    assert np.array_equal(kernel[0], twin[0])
    assert same_numbers(kernel[1], twin[1], "float32")
    assert same_numbers(kernel[2], twin[2], "float32")


@pytest.mark.parametrize("dtype", SMALL_FLOATS)
@settings(max_examples=25)
@given(data=st.data())
def test_dequantising_kernel_and_twin_agree(cupy, dtype, data):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32), label="seed"))
    count = data.draw(COUNTS, label="count")
    num_peers = data.draw(st.integers(1, 5), label="peers")
    stride = count + data.draw(st.sampled_from([-count % 8, 0, 3]), label="padding")
    codes = Placed(cupy, rng.integers(-127, 128, (num_peers, stride), np.int8), data.draw(st.sampled_from([0, 8, 5])))
    scales = Placed(cupy, random_elements(rng, "float32", num_peers * (num_scales(count) + 1)).reshape(num_peers, -1))
    target = Placed(cupy, random_elements(rng, dtype, count), data.draw(st.sampled_from([0, 1]), label="shift"))
    factor = data.draw(st.sampled_from([1.0, 1 / 3, 1e30]), label="factor")
    expected = target.array.copy()
    twins.dequantise_blocks(codes.array[:, :count], scales.array[:, :-1], expected, dtype=DTYPES[dtype], factor=factor)
    dequantise_blocks(
        codes.address,
        scales.address,
        target.address,
        count=count,
        dtype=DTYPES[dtype],
        num_peers=num_peers,
        codes_stride=stride,
        scales_stride=num_scales(count) + 1,
        factor=factor,
    )
    cupy.cuda.get_current_stream().synchronize()
    target.check_surroundings()
    assert same_numbers(target.array, expected, dtype)


def test_what_is_sent_and_what_is_kept_add_up(cupy):
    """Error feedback: over many steps what was sent is the sum of the gradients, but for the residual that is left."""
    rng = np.random.default_rng(1)
    count, num_steps = 1000, 20
    residual, sent, total = np.zeros(count, np.float32), np.zeros(count), np.zeros(count)
    for _ in range(num_steps):
        gradient = rng.standard_normal(count).astype(np.float32)
        total += gradient
        codes, scales, residual = quantise_both(cupy, gradient, residual, "float32")[0]
        received = Placed(cupy, np.empty(count, np.float32))
        given = [Placed(cupy, array) for array in (codes, scales)]
        dequantise_blocks(*[each.address for each in (*given, received)], count=count, dtype=DTYPES["float32"])
        cupy.cuda.get_current_stream().synchronize()
        sent += received.array
        assert (np.abs(residual) <= 0.5001 * np.repeat(scales, QUANTA)[:count]).all()
    assert np.allclose(sent + residual, total, rtol=0, atol=1e-5)
    assert np.abs(sent - total).max() > 1e-3


def test_overflow_is_seen_by_those_who_receive_it_and_forgotten(cupy):
    elements = np.ones(3 * QUANTA, np.float32)
    elements[5], elements[QUANTA + 7] = np.inf, np.nan
    for codes, scales, residual in quantise_both(cupy, elements, np.ones_like(elements), "float32"):
        assert np.isnan(scales[:2]).all()
        assert scales[2] == np.float32(2) / np.float32(127)
        assert (codes[2 * QUANTA :] == 127).all()
        assert np.isfinite(residual).all()


def test_numbers_without_a_scale_stay_in_the_residual(cupy):
    elements = np.full(QUANTA, np.float32(1e-45))
    for codes, scales, residual in quantise_both(cupy, elements, np.zeros_like(elements), "float32"):
        assert (codes == 0).all()
        assert scales[0] == 0
        assert np.array_equal(residual, elements)


def test_arguments_are_checked(cupy):
    with pytest.raises(TypeError, match=r"^dtype: cannot be quantised, got float64; use one of float16, bfloat16, flo"):
        quantise_blocks(0, 0, 0, 0, count=1, dtype=DTYPES["float64"])
    with pytest.raises(ValueError, match=r"^num_peers: must be at least 1, got 0; pass the number of ranks"):
        dequantise_blocks(0, 0, 0, count=1, dtype=DTYPES["float32"], num_peers=0)
