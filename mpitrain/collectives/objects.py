"""Pickled objects over all-gathers of bytes."""

from __future__ import annotations

import pickle
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpitrain.collectives.verbs import Collectives

__all__ = ["exchange_pickled"]


def exchange_pickled(comm: Collectives, rank: int, value: Any) -> list[bytes]:
    """Return the pickled values of all ranks, in rank order.

    Raises:
        ValueError: A value cannot be pickled; on every rank.
    """
    try:
        data, error = pickle.dumps(value), ""
    except Exception as problem:  # noqa: BLE001  (whatever a class's own pickling raises)
        data, error = b"", f"rank {rank}: {type(value).__qualname__} cannot be pickled ({problem})"
    header = np.array([[len(data), len(error.encode())]], np.int64)
    lengths = comm.allgather(header)
    if lengths[:, 1].any():
        texts = _allgather_bytes(comm, error.encode(), lengths[:, 1])
        raise ValueError("object: " + "; ".join(text.decode() for text in texts if text))
    return _allgather_bytes(comm, data, lengths[:, 0])


def _allgather_bytes(comm: Collectives, data: bytes, lengths: NDArray[np.int64]) -> list[bytes]:
    rows = [int(length) for length in lengths]
    everything = comm.allgather(np.frombuffer(data, np.uint8), rows=rows)
    ends = list(accumulate(rows))
    return [everything[end - length : end].tobytes() for end, length in zip(ends, rows, strict=True)]
