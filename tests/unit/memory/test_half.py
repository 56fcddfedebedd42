"""float16 and bfloat16, bit for bit: with torch, without it, and by fractions."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpitrain.memory import DTYPES, ReduceOp, divide_by, flat_view, half, reduce_into, scale
from mpitrain.memory.blocks import BLOCK_COUNT

torch = pytest.importorskip("torch")

NAMES = ["float16", "bfloat16"]
# Bits of the significand with its hidden one, and the exponent of the smallest subnormal.
FORMATS = {"float16": (11, -24), "bfloat16": (8, -133), "float32": (24, -149)}
LARGEST = {
    "float16": Fraction(65504),
    "bfloat16": Fraction(2**8 - 1) * 2**120,
    "float32": Fraction(2**24 - 1) * 2**104,
}
ALL_BITS = np.arange(1 << 16, dtype=np.uint16)
# Zeros, subnormals, normal numbers with even and odd last bits, the largest ones.
EDGES = {
    "float16": [0, 1, 2, 0x3FF, 0x400, 0x401, 0x3C00, 0x3C01, 0x3BFF, 0x4248, 0x7BFF, 0x7BFE, 0x1400, 0x1000],
    "bfloat16": [0, 1, 2, 0x7F, 0x80, 0x81, 0x3F80, 0x3F81, 0x3F7F, 0x4049, 0x7F7F, 0x7F7E, 0x3B80, 0x3B81],
}
OPS = [ReduceOp.SUM, ReduceOp.AVERAGE, ReduceOp.PRODUCT, ReduceOp.MIN, ReduceOp.MAX]
EXACT = {
    ReduceOp.SUM: lambda a, b: a + b,
    ReduceOp.AVERAGE: lambda a, b: a + b,
    ReduceOp.PRODUCT: lambda a, b: a * b,
    ReduceOp.MIN: min,
    ReduceOp.MAX: max,
}


@pytest.fixture(params=["torch", "numpy"])
def backend(request, monkeypatch):
    if request.param == "numpy":
        monkeypatch.setattr(half, "loaded_torch", lambda: None)
    return request.param


def storage(bits, name):
    return np.array(bits, np.uint16).view(DTYPES[name].storage)


def bits_of(data):
    return data.view(np.uint16)


def values(data, name):
    """The numbers as float64, decoded by hand."""
    significand_bits, smallest = FORMATS[name]
    bits = bits_of(data).astype(np.int64)
    mantissa = bits & ((1 << (significand_bits - 1)) - 1)
    exponent = (bits & 0x7FFF) >> (significand_bits - 1)
    special = exponent == 0x7FFF >> (significand_bits - 1)
    hidden = np.where(exponent > 0, 1 << (significand_bits - 1), 0)
    magnitude = np.ldexp((mantissa + hidden).astype(float), np.maximum(exponent - 1, 0) + smallest)
    magnitude = np.where(special, np.where(mantissa > 0, np.nan, np.inf), magnitude)
    return np.where(bits >> 15, -magnitude, magnitude)


def rounded(value, name):
    """Round a fraction to the nearest number of a format, ties to even; overflow gives infinity."""
    if value == 0:
        return value
    significand_bits, smallest = FORMATS[name]
    magnitude = abs(value)
    exponent = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
    if Fraction(2) ** exponent > magnitude:
        exponent -= 1
    unit = Fraction(2) ** max(exponent - significand_bits + 1, smallest)
    nearest = round(magnitude / unit) * unit  # Python's round() takes ties to even
    if nearest > LARGEST[name]:
        return math.copysign(math.inf, value)
    return nearest if value > 0 else -nearest


def expected_number(exact, name):
    """Rounded to float32 first, then to the format: that is what computing in float32 means."""
    wide = rounded(exact, "float32")
    return float(wide if isinstance(wide, float) else rounded(wide, name))


def same_numbers(found, expected):
    return np.array_equal(found, np.array(expected), equal_nan=True)


def test_reference_decodes_like_torch_and_numpy():
    as_torch = torch.from_numpy(ALL_BITS.view(np.int16)).view(torch.bfloat16).double().numpy()
    assert same_numbers(values(ALL_BITS, "bfloat16"), as_torch)
    assert same_numbers(values(ALL_BITS, "float16"), ALL_BITS.view(np.float16).astype(float))


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
@pytest.mark.parametrize("name", NAMES)
def test_edge_values_round_to_nearest_even(name, op, backend):
    edges = EDGES[name] + [bits | 0x8000 for bits in EDGES[name]]
    left, right = (storage(grid.ravel(), name) for grid in np.meshgrid(edges, edges))
    pairs = zip(values(left, name), values(right, name), strict=True)
    expected = [expected_number(EXACT[op](Fraction(a), Fraction(b)), name) for a, b in pairs]
    before = right.copy()
    reduce_into(left, right, op, DTYPES[name])
    assert same_numbers(values(left, name), expected)
    assert np.array_equal(bits_of(right), bits_of(before))


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
@pytest.mark.parametrize("name", NAMES)
@given(pairs=st.lists(st.tuples(st.integers(0, 0xFFFF), st.integers(0, 0xFFFF)), max_size=50))
def test_any_values_agree_with_fractions_and_without_torch(name, op, pairs):
    left = storage([a for a, _ in pairs], name)
    right = storage([b for _, b in pairs], name)
    with_torch, without = left.copy(), left.copy()
    numbers = list(zip(values(left, name), values(right, name), strict=True))
    reduce_into(with_torch, right, op, DTYPES[name])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(half, "loaded_torch", lambda: None)
        reduce_into(without, right, op, DTYPES[name])
    for found in (with_torch, without):
        for (a, b), result in zip(numbers, values(found, name), strict=True):
            if math.isfinite(a) and math.isfinite(b):
                assert result == expected_number(EXACT[op](Fraction(a), Fraction(b)), name)
            elif math.isnan(a) or math.isnan(b):
                assert math.isnan(result)


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
@pytest.mark.parametrize("name", NAMES)
def test_same_bits_with_and_without_torch(name, op, monkeypatch):
    rng = np.random.default_rng(1)
    count = 4 * (1 << 16) + 13
    left = storage(np.resize(ALL_BITS, count), name)
    negated = storage(bits_of(left) ^ 0x8000, name)
    for right in (storage(rng.integers(0, 1 << 16, count), name), np.roll(left, 5), negated):
        with_torch, without = left.copy(), left.copy()
        reduce_into(with_torch, right, op, DTYPES[name])
        with monkeypatch.context() as patch:
            patch.setattr(half, "loaded_torch", lambda: None)
            reduce_into(without, right, op, DTYPES[name])
        is_nan = np.isnan(values(with_torch, name))
        assert np.array_equal(is_nan, np.isnan(values(without, name)))
        assert np.array_equal(bits_of(with_torch)[~is_nan], bits_of(without)[~is_nan])


@pytest.mark.parametrize("name", NAMES)
def test_sum_has_the_bits_of_torch(name, backend):
    torch.manual_seed(1)
    left, right = torch.randn(2, 100_003).to(getattr(torch, name))
    expected = left + right
    reduce_into(flat_view(left, writable=True).data, flat_view(right).data, ReduceOp.SUM, DTYPES[name])
    assert torch.equal(left.view(torch.int16), expected.view(torch.int16))


@pytest.mark.parametrize("name", NAMES)
def test_min_and_max_order_zeros_and_do_not_depend_on_the_side(name):
    zeros = storage([0x0000, 0x8000] * 50, name)
    for left, right in ((zeros, np.roll(zeros, 1)), (np.roll(zeros, 1), zeros)):
        smaller, larger = left.copy(), left.copy()
        reduce_into(smaller, right, ReduceOp.MIN, DTYPES[name])
        reduce_into(larger, right, ReduceOp.MAX, DTYPES[name])
        assert set(bits_of(smaller).tolist()) == {0x8000}
        assert set(bits_of(larger).tolist()) == {0x0000}


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
@pytest.mark.parametrize("name", NAMES)
def test_every_nan_stays_nan(name, op, backend):
    nans = ALL_BITS[np.isnan(values(ALL_BITS, name))]
    ones = np.full(nans.size, {"float16": 0x3C00, "bfloat16": 0x3F80}[name], np.uint16)
    for left, right in ((nans, ones), (ones, nans), (nans, nans[::-1].copy())):
        data = storage(left, name)
        reduce_into(data, storage(right, name), op, DTYPES[name])
        assert np.isnan(values(data, name)).all()


@pytest.mark.parametrize("name", NAMES)
def test_infinities(name, backend):
    inf = {"float16": 0x7C00, "bfloat16": 0x7F80}[name]
    largest = inf - 1
    data = storage([inf, inf, largest, largest | 0x8000, 0x8000 | inf], name)
    reduce_into(data, storage([inf, inf | 0x8000, largest, largest | 0x8000, 1], name), ReduceOp.SUM, DTYPES[name])
    assert repr(values(data, name).tolist()) == "[inf, nan, inf, -inf, -inf]"


@pytest.mark.parametrize("factor", [0.5, 3.0, 1 / 3, -1e-3, 1e5, 1e-30, 1e300, 0.0, math.inf, math.nan])
@pytest.mark.parametrize("name", NAMES)
def test_scale_rounds_a_float32_product(name, factor, backend):
    data = storage(ALL_BITS, name)
    numbers = values(data, name)
    scale(data, factor, DTYPES[name])
    found = values(data, name)
    factor32 = rounded(Fraction(factor), "float32") if math.isfinite(factor) else factor
    if isinstance(factor32, float):
        with np.errstate(invalid="ignore"):
            assert same_numbers(found, numbers * factor32)
        return
    finite = np.isfinite(numbers)
    with np.errstate(invalid="ignore"):
        assert same_numbers(found[~finite], numbers[~finite] * float(factor32))
    sample = np.flatnonzero(finite)[::37]
    assert same_numbers(found[sample], [expected_number(Fraction(numbers[i]) * factor32, name) for i in sample])


@pytest.mark.parametrize("divisor", [1, 2, 3, 7, 48, 1000, 1 << 20])
@pytest.mark.parametrize("name", NAMES)
def test_average_rounds_a_float32_quotient(name, divisor, backend):
    data = storage(ALL_BITS, name)
    numbers = values(data, name)
    divide_by(data, divisor, DTYPES[name])
    found = values(data, name)
    finite = np.isfinite(numbers)
    assert same_numbers(found[~finite], numbers[~finite])
    sample = np.flatnonzero(finite)[::37]
    assert same_numbers(found[sample], [expected_number(Fraction(numbers[i]) / divisor, name) for i in sample])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("number", [3, 5, 7, 11, 96, 0.7, 1e-3, 123.456])
def test_scale_and_average_have_the_same_bits_without_torch(name, number, monkeypatch):
    results = []
    for hook in (half.loaded_torch, lambda: None):
        monkeypatch.setattr(half, "loaded_torch", hook)
        data = storage(ALL_BITS, name)
        if isinstance(number, int):
            divide_by(data, number, DTYPES[name])
        else:
            scale(data, number, DTYPES[name])
        results.append(bits_of(data)[~np.isnan(values(data, name))])
    assert np.array_equal(*results)


@pytest.mark.parametrize("count", [0, 1, BLOCK_COUNT - 1, BLOCK_COUNT, BLOCK_COUNT + 1, 2 * BLOCK_COUNT + 5])
@pytest.mark.parametrize("name", NAMES)
def test_blocks_cover_the_array(name, count, backend):
    # Integers up to 100 are exact in both formats, and so are their sums, up to 200, and doubles.
    numbers = torch.arange(count) % 101
    data = flat_view(numbers.to(getattr(torch, name)), writable=True).data
    operand = data[::-1].copy()
    expected = numbers + numbers.flip(0)
    reduce_into(data, operand, ReduceOp.SUM, DTYPES[name])
    assert values(data, name).tolist() == expected.tolist()
    reduce_into(data, operand, ReduceOp.MAX, DTYPES[name])
    assert values(data, name).tolist() == expected.tolist()
    reduce_into(data, operand, ReduceOp.MIN, DTYPES[name])
    assert values(data, name).tolist() == numbers.flip(0).tolist()
    scale(data, 2.0, DTYPES[name])
    assert values(data, name).tolist() == (2 * numbers.flip(0)).tolist()
