"""reduce_peers and its twin, over all types, operations and alignments."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpitrain.memory import DTYPES, ReduceOp, twins
from mpitrain.memory.device.kernels import MAX_PEERS, all_variants, reduce_peers
from mpitrain.memory.reduction import check_op
from tests.support.placed import Placed, random_elements, same_numbers

OPS = [ReduceOp.SUM, ReduceOp.AVERAGE, ReduceOp.PRODUCT, ReduceOp.MIN, ReduceOp.MAX]


def is_defined(op, dtype):
    try:
        check_op(op, dtype)
    except TypeError:
        return False
    return True


CASES = [(dtype.name, op) for dtype in DTYPES.values() for op in OPS if is_defined(op, dtype)]

# NumPy fuses the multiplications and additions of a complex product where the machine does.
EXACT = [case for case in CASES if not (case[0].startswith("complex") and case[1] is ReduceOp.PRODUCT)]


def run_both(cupy, sources, *, targets=(), in_place=(), shifts=None, divisor=None, dtype, op, **options):
    """Return what the kernel and its twin write into all targets; sources that are no targets must stay."""
    count = sources[0].size
    shifts = shifts or [0] * (len(sources) + len(targets))
    placed = [Placed(cupy, array, shift) for array, shift in zip([*sources, *targets], shifts, strict=True)]
    outputs = [*range(len(sources), len(placed)), *in_place]
    host = [each.array.copy() for each in placed]
    addresses = [each.address for each in placed]
    reduce_peers(
        addresses[: len(sources)],
        [addresses[index] for index in outputs],
        count=count,
        dtype=DTYPES[dtype],
        op=op,
        divisor=divisor,
        **options,
    )
    default = len(sources) if op is ReduceOp.AVERAGE else 1
    twins.reduce_peers(
        host[: len(sources)],
        [host[index] for index in outputs],
        dtype=DTYPES[dtype],
        op=op,
        divisor=divisor or default,
    )
    cupy.cuda.get_current_stream().synchronize()
    for index, each in enumerate(placed):
        each.check_surroundings()
        if index not in outputs:
            assert np.array_equal(each.array.view(np.uint8), host[index].view(np.uint8))
    return [(placed[index].array, host[index]) for index in outputs]


@pytest.mark.parametrize(("dtype", "op"), EXACT, ids=lambda value: getattr(value, "name", value))
@settings(max_examples=10)
@given(data=st.data())
def test_kernel_and_twin_agree(cupy, dtype, op, data):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32), label="seed"))
    # Each number of peers that the compiler knows takes a variant of its own: at most one of them for a case.
    position = EXACT.index((dtype, op))
    known = (2, 3, 4, 5, 8, 7)[position % 6]
    num_sources = data.draw(st.sampled_from([known, 1, 3, 6, 9]), label="sources")
    num_targets = data.draw(st.integers(0, 3), label="targets")
    count = data.draw(st.one_of(st.integers(0, 40), st.integers(500, 2000)), label="count")
    in_place = data.draw(st.sets(st.integers(0, num_sources - 1)), label="in place")
    if not num_targets and not in_place:
        in_place = {0}
    together = data.draw(st.integers(0, 15), label="shift")
    shifts = [together] * (num_sources + num_targets)
    if data.draw(st.booleans(), label="unaligned"):
        shifts = [int(shift) for shift in rng.integers(0, 16, len(shifts))]
    divisor = None
    if dtype != "bool" and data.draw(st.booleans(), label="divided"):
        divisor = data.draw(st.sampled_from([1, 2, 3, 7, 300, 70_000]), label="divisor")
    arrays = [random_elements(rng, dtype, count) for _ in range(num_sources + num_targets)]
    sources, targets = arrays[:num_sources], arrays[num_sources:]
    results = run_both(
        cupy, sources, targets=targets, in_place=in_place, shifts=shifts, divisor=divisor, dtype=dtype, op=op
    )
    for found, expected in results:
        assert same_numbers(found, expected, dtype)


@pytest.mark.parametrize("dtype", ["complex64", "complex128"])
@pytest.mark.parametrize("num_sources", [2, 3])
def test_complex_product_is_that_of_numpy_up_to_rounding(cupy, dtype, num_sources):
    rng = np.random.default_rng(num_sources)
    sources = [random_elements(rng, dtype, 333, special=False) for _ in range(num_sources)]
    ((found, expected),) = run_both(cupy, sources, in_place=[1], dtype=dtype, op=ReduceOp.PRODUCT)
    scale = np.prod([np.abs(source) for source in sources], axis=0)
    assert (np.abs(found - expected) <= 8 * np.finfo(dtype).eps * scale).all()


@pytest.mark.parametrize("num_sources", [1, 2, 3, 4, 5, 8, 13, MAX_PEERS])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sums_are_rounded_in_the_order_of_the_peers(cupy, dtype, num_sources):
    rng = np.random.default_rng(num_sources)
    sources = [random_elements(rng, dtype, 1000, special=False) for _ in range(num_sources)]
    results = run_both(cupy, sources, in_place=range(num_sources), dtype=dtype, op=ReduceOp.SUM)
    assert all(same_numbers(found, expected, dtype) for found, expected in results)
    if dtype == "bfloat16" and num_sources > 2:
        rounded_once = results[0][0]
        step_by_step = sources[0].copy()
        for source in sources[1:]:
            twins.reduce_peers([step_by_step, source], [step_by_step], dtype=DTYPES[dtype], op=ReduceOp.SUM)
        assert not np.array_equal(rounded_once, step_by_step)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("op", [ReduceOp.MIN, ReduceOp.MAX])
def test_zeros_are_ordered_by_their_sign(cupy, dtype, op):
    numbers = np.array([0.0, 0.0, -0.0, -0.0]), np.array([0.0, -0.0, 0.0, -0.0])
    sources = [random_elements(np.random.default_rng(1), dtype, 4) for _ in numbers]
    for source, zeros in zip(sources, numbers, strict=True):
        source[:] = np.signbit(zeros) * 0x8000 if dtype == "bfloat16" else zeros
    ((found, expected),) = run_both(cupy, sources, in_place=[1], dtype=dtype, op=op)
    assert same_numbers(found, expected, dtype)
    is_negative = found.view(f"i{found.itemsize}") < 0
    assert is_negative.tolist() == ([False, True, True, True] if op is ReduceOp.MIN else [False, False, False, True])


def test_few_blocks_do_all_the_work(cupy):
    rng = np.random.default_rng(5)
    sources = [random_elements(rng, "float32", 20_011) for _ in range(2)]
    ((found, expected),) = run_both(cupy, sources, in_place=[0], dtype="float32", op=ReduceOp.SUM, most_blocks=3)
    assert same_numbers(found, expected, "float32")


def test_arguments_are_checked(cupy):
    float32 = DTYPES["float32"]
    with pytest.raises(ValueError, match=r"^sources: must be 1 to 64 arrays, got 0; reduce in several steps"):
        reduce_peers([], [16], count=1, dtype=float32, op=ReduceOp.SUM)
    with pytest.raises(ValueError, match=r"^targets: must be 1 to 64 arrays, got 65; reduce in several steps"):
        reduce_peers([16], [16] * 65, count=1, dtype=float32, op=ReduceOp.SUM)
    with pytest.raises(ValueError, match=r"^op: must be elementwise, got adasum; combine whole vectors instead"):
        reduce_peers([16], [16], count=1, dtype=float32, op=ReduceOp.ADASUM)
    with pytest.raises(ValueError, match=r"^divisor: must be at least 1, got 0; pass the number of ranks"):
        reduce_peers([16], [16], count=1, dtype=float32, op=ReduceOp.AVERAGE, divisor=0)
    with pytest.raises(TypeError, match=r"^op: min is not defined for this dtype, got complex64; reduce real"):
        reduce_peers([16], [16], count=1, dtype=DTYPES["complex64"], op=ReduceOp.MIN)
    with pytest.raises(TypeError, match=r"^divisor: cannot divide bool, got 2; convert to a number dtype"):
        reduce_peers([16], [16], count=1, dtype=DTYPES["bool"], op=ReduceOp.MAX, divisor=2)


def test_there_is_a_variant_for_each_case():
    variants = {str(variant) for variant in all_variants() if variant.source == "reduce_peers"}
    assert len(variants) == 4 * (len(CASES) - sum(op is ReduceOp.AVERAGE for _, op in CASES))
