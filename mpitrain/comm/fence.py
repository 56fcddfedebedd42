"""The barrier that orders what a rank writes to memory that others read."""

from __future__ import annotations

import functools
import platform
from collections.abc import Callable

from mpitrain.comm.start import MPI

__all__ = ["memory_fence"]

# These show stores to other cores in the order of the program, and loads likewise.
_IN_ORDER = ("x86_64", "AMD64", "i686")


@functools.cache
def memory_fence() -> Callable[[], None] | None:
    """Return a function that is a full memory barrier; None where the processor needs none.

    Python has none of its own; that of the MPI standard is MPI_Win_sync, for which any window will do.
    """
    if platform.machine() in _IN_ORDER:
        return None
    window = MPI.Win.Allocate(8, 1, comm=MPI.COMM_SELF)
    window.Lock_all(MPI.MODE_NOCHECK)
    return window.Sync
