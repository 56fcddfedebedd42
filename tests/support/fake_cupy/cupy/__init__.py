"""Stands in for CuPy where there is no GPU: the part of its interface that mpitrain uses, over host memory.

It is put on the path by `tests.support.fake_cupy`, and is as late as a device: see `_machine`.
"""

from cupy import cuda
from cupy._arrays import (
    arange,
    array,
    asarray,
    asnumpy,
    concatenate,
    empty,
    empty_like,
    full,
    may_share_memory,
    ndarray,
    ones,
    zeros,
    zeros_like,
)
from cupy._kernels import RawKernel, RawModule
from numpy import bool_, dtype, float16, float32, float64, int8, int16, int32, int64, uint8, uint16

__version__ = "14.0.0+standin"


def get_default_memory_pool():
    return cuda.memory._default_pool
