"""Launches `select_values`: the large elements with their indices, and all others kept for the next time."""

from __future__ import annotations

import numpy as np

from mpitrain.memory.device.kernels.loader import THREADS, TILE, Array, address_of, launch, num_blocks_for
from mpitrain.memory.device.kernels.variants import select_variant
from mpitrain.memory.device.streams import Stream
from mpitrain.memory.dtypes import DType
from mpitrain.memory.twins import wide_dtype

__all__ = ["places_count", "select_values"]

_MAX_COUNT = 2**31 - 1


def places_count(count: int) -> int:
    """Return how many int32 of scratch memory `select_values` needs for `count` elements."""
    return -(-count // TILE)


def select_values(
    elements: Array,
    residual: Array,
    indices: Array,
    values: Array,
    total: Array,
    *,
    places: Array,
    count: int,
    capacity: int,
    threshold: float,
    dtype: DType,
    stream: Stream | None = None,
) -> None:
    """Select where `|elements + residual| >= threshold`, in the order of the index.

    Args:
        elements: A floating-point type; not modified.
        residual: float64 for float64, else float32; what is not sent is left here.
        indices: int32, `capacity` of them; written as far as elements are selected.
        values: Of `dtype`, `capacity` of them; as `indices`.
        total: int32, one element; written: how many are selected, which may be more than `capacity`.
        places: int32, `places_count(count)` of them; scratch.
        count: Elements, at least 1 and less than 2^31.
        capacity: Room for what is selected; what has none stays in the residual.
        threshold: At 0 all elements are selected.
        dtype: Type of the elements.
        stream: Stream of the current device; CuPy's current one without.

    Raises:
        TypeError: No floating-point type.
        ValueError: No element, or more than an index can tell.
        UnavailableError: The kernel cannot be compiled here.

    Cost: three launches; reads elements and residual twice, writes the residual once.
    """
    variant = select_variant(dtype)
    if not 1 <= count <= _MAX_COUNT:
        raise ValueError(f"count: must be 1 to {_MAX_COUNT}, got {count}; select from parts")
    elements, residual, places = address_of(elements), address_of(residual), address_of(places)
    limit = wide_dtype(dtype).type(threshold)
    num_tiles = places_count(count)
    num_blocks = num_blocks_for(num_tiles * THREADS)
    chosen = (elements, residual, np.int64(count), limit, places)
    launch(variant, "select_values_count", num_blocks, chosen, stream)
    launch(variant, "select_values_places", 1, (places, np.int64(num_tiles), address_of(total)), stream)
    written = (np.int64(capacity), address_of(indices), address_of(values))
    launch(variant, "select_values_write", num_blocks, (*chosen, *written), stream)
