"""Arrays of every library as flat views, element types, reductions and scratch memory."""

from __future__ import annotations

from mpitrain.memory.adasum import add_weighted, inner_products
from mpitrain.memory.arrays import FlatArray, allocate_like, copy_of, flat_view, is_on_device
from mpitrain.memory.blocks import quiet_context
from mpitrain.memory.cross_memory import CrossMemory, Sample, address_of, can_read, make_sample
from mpitrain.memory.device.shared import SharedDeviceArray
from mpitrain.memory.dtypes import DTYPES, DType, as_dtype, dtype_named, dtype_of_numpy, dtype_of_torch
from mpitrain.memory.reduction import (
    ReduceOp,
    check_op,
    divide_by,
    fill_neutral,
    parse_op,
    plain_ufunc,
    reduce_into,
    scale,
)
from mpitrain.memory.scratch import ScratchPool
from mpitrain.memory.shared import (
    NodeArray,
    Place,
    SharedArray,
    SharedBlock,
    allocate_mapped,
    free_shared_nbytes,
    total_shared_nbytes,
)

__all__ = [
    "DTYPES",
    "CrossMemory",
    "DType",
    "FlatArray",
    "NodeArray",
    "Place",
    "ReduceOp",
    "Sample",
    "ScratchPool",
    "SharedArray",
    "SharedBlock",
    "SharedDeviceArray",
    "add_weighted",
    "address_of",
    "allocate_like",
    "allocate_mapped",
    "as_dtype",
    "can_read",
    "check_op",
    "copy_of",
    "divide_by",
    "dtype_named",
    "dtype_of_numpy",
    "dtype_of_torch",
    "fill_neutral",
    "flat_view",
    "free_shared_nbytes",
    "inner_products",
    "is_on_device",
    "make_sample",
    "parse_op",
    "plain_ufunc",
    "quiet_context",
    "reduce_into",
    "scale",
    "total_shared_nbytes",
]
