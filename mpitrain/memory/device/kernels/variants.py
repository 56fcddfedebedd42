"""The macros that each source is compiled with, by what it is asked for."""

from __future__ import annotations

from collections.abc import Iterator

from mpitrain.memory.device.kernels.loader import Variant
from mpitrain.memory.dtypes import DTYPES, DType
from mpitrain.memory.reduction import ReduceOp, check_op
from mpitrain.memory.twins import QUANTA, wide_dtype

__all__ = [
    "all_variants",
    "dequantise_variant",
    "quantise_variant",
    "reduce_variant",
    "segment_variant",
    "select_variant",
    "update_variant",
]

_COMBINE = {
    ReduceOp.SUM: "add",
    ReduceOp.AVERAGE: "add",
    ReduceOp.PRODUCT: "multiply",
    ReduceOp.MIN: "smaller",
    ReduceOp.MAX: "larger",
}
# How many peers a kernel knows when it is compiled, so that it reads from all before it adds.
_KNOWN_PEERS = (2, 4, 8)
_FLOATS = [dtype for dtype in DTYPES.values() if dtype.kind == "float"]
_QUANTISABLE = [dtype for dtype in _FLOATS if dtype.itemsize <= 4]


def _element(dtype: DType) -> str:
    """Return the name of a type in the sources; `bool` is one of C++'s own."""
    return "boolean" if dtype.kind == "bool" else dtype.name


def reduce_variant(dtype: DType, op: ReduceOp, num_sources: int) -> Variant:
    """Return the variant of `reduce_peers` for an operation that is defined for `dtype`, but for adasum."""
    known = num_sources if num_sources in _KNOWN_PEERS else 0
    return Variant("reduce_peers", (("ELEMENT", _element(dtype)), ("COMBINE", _COMBINE[op]), ("PEERS", known)))


def segment_variant(source: str, tensor: DType, bucket: DType) -> Variant:
    """Return the variant of `pack_segments` or `unpack_segments` for two floating-point types."""
    wide_dtype(tensor, bucket)
    return Variant(source, (("TENSOR", tensor.name), ("BUCKET", bucket.name)))


def _quantum_variant(source: str, dtype: DType) -> Variant:
    if dtype not in _QUANTISABLE:
        known = ", ".join(each.name for each in _QUANTISABLE)
        raise TypeError(f"dtype: cannot be quantised, got {dtype}; use one of {known}")
    return Variant(source, (("ELEMENT", dtype.name), ("QUANTA", QUANTA)))


def quantise_variant(dtype: DType) -> Variant:
    """Return the variant of `quantise_blocks` for float32, float16 or bfloat16."""
    return _quantum_variant("quantise_blocks", dtype)


def dequantise_variant(dtype: DType) -> Variant:
    """Return the variant of `dequantise_blocks` for float32, float16 or bfloat16."""
    return _quantum_variant("dequantise_blocks", dtype)


def select_variant(dtype: DType) -> Variant:
    """Return the variant of `select_values` for a floating-point type."""
    wide_dtype(dtype)
    return Variant("select_values", (("ELEMENT", dtype.name),))


def update_variant(source: str, parameter: DType, gradient: DType) -> Variant:
    """Return the variant of `update_momentum` or `update_adam` for two floating-point types."""
    wide_dtype(parameter, gradient)
    return Variant(source, (("PARAMETER", parameter.name), ("GRADIENT", gradient.name)))


def all_variants() -> Iterator[Variant]:
    """Yield every variant of every source that anything here can launch."""
    for dtype in DTYPES.values():
        for op in _COMBINE:
            if op is not ReduceOp.AVERAGE and _is_defined(op, dtype):
                yield from (reduce_variant(dtype, op, num_sources) for num_sources in (1, *_KNOWN_PEERS))
    for first in _FLOATS:
        for second in _FLOATS:
            yield segment_variant("pack_segments", first, second)
            yield segment_variant("unpack_segments", first, second)
            yield update_variant("update_momentum", first, second)
            yield update_variant("update_adam", first, second)
        yield select_variant(first)
    for dtype in _QUANTISABLE:
        yield quantise_variant(dtype)
        yield dequantise_variant(dtype)


def _is_defined(op: ReduceOp, dtype: DType) -> bool:
    try:
        check_op(op, dtype)
    except TypeError:
        return False
    return True
