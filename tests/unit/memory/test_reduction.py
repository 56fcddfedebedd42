"""Every operation on every element type, against integers and fractions of Python."""

from __future__ import annotations

import math
import tracemalloc
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mpitrain.memory import DTYPES, ReduceOp, check_op, divide_by, half, parse_op, reduce_into, scale
from mpitrain.memory.blocks import BLOCK_COUNT

INTEGERS = [name for name, dtype in DTYPES.items() if dtype.kind in ("int", "uint")]
FLOATS = ["float32", "float64"]
COMPLEX = ["complex64", "complex128"]
COUNTS = [0, 1, 1000, BLOCK_COUNT - 1, BLOCK_COUNT + 1, 2 * BLOCK_COUNT + 7]
PYTHON = {
    ReduceOp.AVERAGE: lambda a, b: a + b,
    ReduceOp.SUM: lambda a, b: a + b,
    ReduceOp.MIN: min,
    ReduceOp.MAX: max,
    ReduceOp.PRODUCT: lambda a, b: a * b,
}


def wrapped(value, name):
    bits = 8 * DTYPES[name].itemsize
    value %= 1 << bits
    return value - (1 << bits) if DTYPES[name].kind == "int" and value >> (bits - 1) else value


def truncated(value, divisor):
    return abs(value) // divisor * (1 if value >= 0 else -1)


def integers(name, count, seed):
    """Random values with the extremes of the type among them."""
    limits = np.iinfo(name)
    values = np.random.default_rng(seed).integers(limits.min, limits.max, count, name, endpoint=True)
    edges = [limits.min, limits.max, limits.min + 1, 0, 1, limits.max - 1][:count]
    values[: len(edges)] = edges
    return values


def reals(name, count, seed):
    rng = np.random.default_rng(seed)
    values = np.ldexp(rng.uniform(-1, 1, count), rng.integers(-30, 30, count)).astype(name)
    values[: min(count, 3)] = [0.0, 1.0, np.finfo(name).smallest_subnormal][: min(count, 3)]
    return values


def test_numbers_of_operations_are_those_of_horovod():
    assert {op.name: op.value for op in ReduceOp} == {
        "AVERAGE": 0, "SUM": 1, "ADASUM": 2, "MIN": 3, "MAX": 4, "PRODUCT": 5,
    }  # fmt: skip


@pytest.mark.parametrize("op", ReduceOp)
def test_parse_op_takes_word_number_and_member(op):
    assert parse_op(op.name.lower()) is parse_op(op.value) is parse_op(op) is op


@pytest.mark.parametrize("op", ["mean", "prod", "SUM", "", -1, 6, True, 1.0, None])
def test_parse_op_lists_the_known(op):
    message = r"^op: unknown reduction, got .*; use one of average \(0\), sum \(1\), .*, product \(5\)$"
    with pytest.raises(ValueError, match=message):
        parse_op(op)


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("op", ReduceOp)
def test_check_op_refuses_what_has_no_meaning(op, name):
    kind = DTYPES[name].kind
    refused = (
        (op is ReduceOp.AVERAGE and kind == "bool")
        or (op in (ReduceOp.MIN, ReduceOp.MAX) and kind == "complex")
        or (op is ReduceOp.ADASUM and kind != "float")
    )
    if not refused:
        check_op(op, DTYPES[name])
        return
    data = np.ones(2, DTYPES[name].storage)
    message = rf"^op: {op.name.lower()} .*, got {name}; "
    with pytest.raises(TypeError, match=message):
        check_op(op, DTYPES[name])
    with pytest.raises(TypeError, match=message):
        reduce_into(data, data, op, DTYPES[name])


def test_reduce_refuses_adasum_which_is_not_elementwise():
    data = np.ones(2, np.float32)
    with pytest.raises(ValueError, match=r"^op: must be elementwise, got adasum; "):
        reduce_into(data, data, ReduceOp.ADASUM, DTYPES["float32"])


@pytest.mark.parametrize("name", DTYPES)
def test_reduce_refuses_arrays_that_do_not_fit(name):
    dtype = DTYPES[name]
    data = np.ones(4, dtype.storage)
    other = np.ones(4, np.int8 if dtype.storage != np.int8 else np.int16)
    # NumPy would broadcast the first and cast the others.
    with pytest.raises(ValueError, match=r"^operand: must have the shape of the accumulator \(4,\), got \(1,\); "):
        reduce_into(data, data[:1], ReduceOp.SUM, dtype)
    with pytest.raises(TypeError, match=f"^operand: must be stored as {dtype.storage}, got {other.dtype}; "):
        reduce_into(data, other, ReduceOp.SUM, dtype)
    for function in (
        lambda: reduce_into(other, data, ReduceOp.SUM, dtype),
        lambda: scale(other, 2, dtype),
        lambda: divide_by(other, 2, dtype),
    ):
        with pytest.raises(TypeError, match=f"must be stored as {dtype.storage}, got {other.dtype}; "):
            function()


@pytest.mark.parametrize("op", [ReduceOp.SUM, ReduceOp.PRODUCT, ReduceOp.MIN, ReduceOp.MAX])
def test_bool_is_logic(op):
    left, right = np.array([0, 0, 1, 1], bool), np.array([0, 1, 0, 1], bool)
    reduce_into(left, right, op, DTYPES["bool"])
    either = op in (ReduceOp.SUM, ReduceOp.MAX)
    assert left.tolist() == ([False, True, True, True] if either else [False, False, False, True])
    assert right.tolist() == [False, True, False, True]


@pytest.mark.parametrize("count", [0, 1, 5, 1000])
@pytest.mark.parametrize("op", PYTHON, ids=lambda op: op.name)
@pytest.mark.parametrize("name", INTEGERS)
def test_integers_wrap(name, op, count):
    left, right = integers(name, count, 1), integers(name, count, 2)
    left[6:] = np.roll(left[6:], 3)
    before = right.copy()
    pairs = zip(left.tolist(), right.tolist(), strict=True)
    expected = [wrapped(PYTHON[op](a, b), name) for a, b in pairs]
    reduce_into(left, right, op, DTYPES[name])
    assert left.tolist() == expected
    assert np.array_equal(right, before)


@pytest.mark.parametrize("count", [0, 1, 5, 1000])
@pytest.mark.parametrize("op", PYTHON, ids=lambda op: op.name)
@pytest.mark.parametrize("name", FLOATS)
def test_floats_are_rounded_once(name, op, count):
    left, right = reals(name, count, 1), reals(name, count, 2)
    before = right.copy()
    # A float32 sum or product, rounded to float64 first, still rounds to the right float32.
    expected = [float(PYTHON[op](Fraction(a), Fraction(b))) for a, b in zip(left.tolist(), right.tolist(), strict=True)]
    reduce_into(left, right, op, DTYPES[name])
    assert left.tolist() == np.array(expected, np.float64).astype(name).tolist()
    assert np.array_equal(right, before)


@pytest.mark.parametrize("op", [ReduceOp.AVERAGE, ReduceOp.SUM, ReduceOp.PRODUCT])
@pytest.mark.parametrize("name", COMPLEX)
def test_complex_numbers(name, op):
    rng = np.random.default_rng(1)
    # Small integers, so that a product is exact in whatever order its parts are added.
    left, right = (rng.integers(-99, 99, 500) + 1j * rng.integers(-99, 99, 500) for _ in range(2))
    data = left.astype(name)
    reduce_into(data, right.astype(name), op, DTYPES[name])
    assert data.tolist() == [PYTHON[op](a, b) for a, b in zip(left.tolist(), right.tolist(), strict=True)]


@pytest.mark.parametrize("name", ["float16", *FLOATS])
def test_overflow_and_nan_are_results_and_not_warnings(name):
    huge, inf, nan = float(np.finfo(name).max), math.inf, math.nan
    left = np.array([huge, inf, nan, 1.0, inf], name)
    reduce_into(left, np.array([huge, -inf, 1.0, nan, inf], name), ReduceOp.SUM, DTYPES[name])
    assert repr(left.tolist()) == "[inf, nan, nan, nan, inf]"
    data = np.array([huge, -huge, nan], name)
    scale(data, 4, DTYPES[name])
    assert repr(data.tolist()) == "[inf, -inf, nan]"


@pytest.mark.parametrize("op", [ReduceOp.MIN, ReduceOp.MAX])
@pytest.mark.parametrize("name", ["float16", *FLOATS])
def test_min_and_max_propagate_nan(name, op):
    inf, nan = math.inf, math.nan
    left = np.array([nan, 1.0, nan, -nan, inf, -inf, 2.0, -inf], name)
    right = np.array([1.0, nan, nan, inf, -nan, inf, -3.0, -1.0], name)
    reduce_into(left, right, op, DTYPES[name])
    finite = "-inf, -3.0, -inf" if op is ReduceOp.MIN else "inf, 2.0, -1.0"
    assert repr(left.tolist()) == f"[nan, nan, nan, nan, nan, {finite}]"


@pytest.mark.parametrize("name", ["int64", "float32", "float16", "bfloat16"])
def test_operand_may_be_the_accumulator_and_read_only(name):
    dtype = DTYPES[name]
    one = {"bfloat16": 0x3F80}.get(name, 1)
    two = {"bfloat16": 0x4000}.get(name, 2)
    data = np.full(5, one, dtype.storage)
    reduce_into(data, data, ReduceOp.SUM, dtype)
    assert data.tolist() == [two] * 5
    window = np.full(5, one, dtype.storage)
    window.flags.writeable = False
    data[:] = one
    reduce_into(data, window, ReduceOp.SUM, dtype)
    assert data.tolist() == [two] * 5


@pytest.mark.parametrize("divisor", [1, 2, 3, 7, 127, 128, 255, 256, 65536, 2**31, 2**63 - 1, 2**63, 2**64, 10**30])
@pytest.mark.parametrize("name", INTEGERS)
def test_integer_average_truncates_toward_zero_exactly(name, divisor):
    for count in (0, 1, 1000):
        data = integers(name, count, 3)
        expected = [truncated(value, divisor) for value in data.tolist()]
        divide_by(data, divisor, DTYPES[name])
        assert data.tolist() == expected


@given(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=40), st.integers(1, 2**64))
@example([-(2**63), -(2**63) + 1, 2**63 - 1], 2**63)
@example([2**53 + 1, -(2**53) - 1, 2**62 + 1], 1)
@example([2**63 - 1, -(2**63)], 3)
def test_int64_average_is_exact(values, divisor):
    data = np.array(values, np.int64)
    divide_by(data, divisor, DTYPES["int64"])
    assert data.tolist() == [truncated(value, divisor) for value in values]


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("name", ["int8", "int64", "uint16"])
def test_integer_blocks_cover_the_array(name, count):
    data = integers(name, count, 4)
    exact = data.astype(object)
    divided, scaled = data.copy(), data.copy()
    divide_by(divided, 3, DTYPES[name])
    assert np.array_equal(divided, np.where(exact < 0, -(-exact // 3), exact // 3).astype(name))
    scale(scaled, 0.5, DTYPES[name])
    assert np.array_equal(scaled, np.trunc(data.astype(np.float64) * 0.5).astype(name))


@pytest.mark.parametrize("divisor", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize("name", [*FLOATS, *COMPLEX])
def test_float_average_is_the_rounded_quotient(name, divisor):
    real = DTYPES[name].storage.type(0).real.dtype.name
    data = reals(real, 1000, 5).view(name)
    parts = data.view(real).tolist()
    divide_by(data, divisor, DTYPES[name])
    # A float64 quotient of float32 numbers rounds to the right float32 in its normal range.
    expected = np.array([float(Fraction(value) / divisor) for value in parts]).astype(real)
    assert data.view(real).tolist() == expected.tolist()


@pytest.mark.parametrize("factor", [1.0, 0.5, -3.0, 0.1, 1e-20, 0.0])
@pytest.mark.parametrize("name", [*FLOATS, *COMPLEX])
def test_scale_of_floats_is_the_rounded_product(name, factor):
    real = DTYPES[name].storage.type(0).real.dtype.name
    data = reals(real, 1000, 6).view(name)
    parts = data.view(real).tolist()
    scale(data, factor, DTYPES[name])
    rounded = Fraction(float(np.dtype(real).type(factor)))
    expected = np.array([float(Fraction(value) * rounded) for value in parts]).astype(real)
    assert data.view(real).tolist() == expected.tolist()


@pytest.mark.parametrize("name", COMPLEX)
def test_scale_of_complex_keeps_infinities(name):
    data = np.array([complex(math.inf, 1), complex(-2, -math.inf)], name)
    scale(data, 2.0, DTYPES[name])
    assert data.tolist() == [complex(math.inf, 2), complex(-4, -math.inf)]


@pytest.mark.parametrize("factor", [1.0, 0.5, -0.5, 2.0, 0.1, -1.0, 1e30, -1e30, 0.0])
@pytest.mark.parametrize("name", INTEGERS)
def test_scale_of_integers_truncates_and_saturates(name, factor):
    data = integers(name, 500, 7)
    limits = np.iinfo(name)
    # float64 cannot hold 2**63 - 1; the next one below takes its place.
    largest = {"int64": 2**63 - 2**10, "uint64": 2**64 - 2**11}.get(name, limits.max)
    expected = [min(max(int(float(value) * factor), limits.min), largest) for value in data.tolist()]
    if factor == 1.0:
        expected = data.tolist()
    scale(data, factor, DTYPES[name])
    assert data.tolist() == expected


def test_factor_may_be_any_real_number():
    for factor in (2, np.float64(2), np.int8(2), Fraction(2)):
        data = np.array([1.5], np.float32)
        scale(data, factor, DTYPES["float32"])
        assert data.tolist() == [3.0]


def test_scale_and_average_refuse_what_has_no_meaning():
    flags = np.ones(2, bool)
    with pytest.raises(TypeError, match=r"^data: cannot be scaled, got bool; "):
        scale(flags, 2, DTYPES["bool"])
    with pytest.raises(TypeError, match=r"^data: cannot be divided, got bool; "):
        divide_by(flags, 2, DTYPES["bool"])
    for factor in (math.nan, math.inf):
        with pytest.raises(ValueError, match=f"^factor: must be finite for int8, got {factor}; "):
            scale(np.ones(2, np.int8), factor, DTYPES["int8"])
    for divisor in (0, -2):
        with pytest.raises(ValueError, match=f"^divisor: must be at least 1, got {divisor}; "):
            divide_by(np.ones(2), divisor, DTYPES["float64"])


@pytest.mark.parametrize("name", DTYPES)
def test_temporaries_stay_small(name, monkeypatch):
    # Torch's memory would not be traced.
    monkeypatch.setattr(half, "loaded_torch", lambda: None)
    dtype = DTYPES[name]
    data, operand = np.ones((2, 1 << 19), dtype.storage)
    jobs = [lambda op=op: reduce_into(data, operand, op, dtype) for op in PYTHON if is_defined(op, dtype)]
    if dtype.kind != "bool":
        jobs += [lambda: scale(data, 1.5, dtype), lambda: divide_by(data, 3, dtype)]
    tracemalloc.start()
    try:
        for job in jobs:
            tracemalloc.reset_peak()
            start = tracemalloc.get_traced_memory()[0]
            job()
            assert tracemalloc.get_traced_memory()[1] - start < 300 << 10
    finally:
        tracemalloc.stop()


def is_defined(op, dtype):
    try:
        check_op(op, dtype)
    except TypeError:
        return False
    return True


@pytest.mark.parametrize("divisor", [2, 4, 8, 1024, 2**40, 2**64, 2**65])
@pytest.mark.parametrize("name", ["float32", "float64"])
def test_powers_of_two_divide_every_float_exactly_as_a_division_does(name, divisor):
    bits = f"u{np.dtype(name).itemsize}"
    random = np.random.default_rng(divisor % 1000).integers(0, 2**64, 50_000, np.uint64).astype(bits)
    # Small numbers, which turn into subnormal ones and zeros, are rare among all.
    small = random >> np.array(np.dtype(name).itemsize * 8 - 26, bits)
    data = np.concatenate([random, small, small | ~(np.array(-1).astype(bits) >> 1)]).view(name)
    with np.errstate(all="ignore"):
        expected = np.true_divide(data, np.dtype(name).type(divisor))
    divide_by(data, divisor, DTYPES[name])
    is_nan = np.isnan(expected)
    assert np.array_equal(np.isnan(data), is_nan)
    assert np.array_equal(data.view(bits)[~is_nan], expected.view(bits)[~is_nan])
