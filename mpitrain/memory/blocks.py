"""In-place arithmetic whose temporaries stay small and in the cache, and which never warns."""

from __future__ import annotations

import contextvars
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["BLOCK_COUNT", "apply_in_place", "blocks", "quiet", "quiet_context"]

# Elements in a block; the temporaries of a block take at most 256 KiB together.
BLOCK_COUNT = 1 << 15

# Overflow to infinity and NaN are results like any other (mixed-precision training relies on them).
quiet = np.errstate(all="ignore")


def quiet_context() -> contextvars.Context:
    """Return a context whose `run` calls functions as `quiet` does, but cheaper; for one thread at a time."""
    context = contextvars.copy_context()
    context.run(np.seterr, all="ignore")
    return context


@quiet
def apply_in_place(ufunc: np.ufunc, data: NDArray[Any], operand: NDArray[Any] | float) -> None:
    """Set `data` to `ufunc(data, operand)`; needs no temporary where the dtypes agree."""
    ufunc(data, operand, out=data)


def blocks(count: int, block_count: int = BLOCK_COUNT) -> Iterator[slice]:
    """Cut `count` elements into blocks of at most `block_count`."""
    for start in range(0, count, block_count):
        yield slice(start, min(start + block_count, count))
