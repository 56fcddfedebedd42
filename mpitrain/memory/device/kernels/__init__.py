"""The kernels of `kernels/`: compiled when they are first needed, and one function for each that launches it.

A launch is queued on the current device: on the current stream of CuPy, or on the stream that is given. Arrays are
addresses or CuPy arrays, contiguous and on the current device or mapped into it; they have to live until the kernel has
run. What a kernel computes is told by its twin in `mpitrain.memory.twins`.
"""

from __future__ import annotations

from mpitrain.memory.device.kernels.loader import THREADS, TILE, Variant, source_text
from mpitrain.memory.device.kernels.quantise import dequantise_blocks, quantise_blocks
from mpitrain.memory.device.kernels.reduce import MAX_PEERS, reduce_peers
from mpitrain.memory.device.kernels.segments import SegmentTable
from mpitrain.memory.device.kernels.select import places_count, select_values
from mpitrain.memory.device.kernels.update import update_adam, update_momentum
from mpitrain.memory.device.kernels.variants import all_variants

__all__ = [
    "MAX_PEERS",
    "THREADS",
    "TILE",
    "SegmentTable",
    "Variant",
    "all_variants",
    "dequantise_blocks",
    "places_count",
    "quantise_blocks",
    "reduce_peers",
    "select_values",
    "source_text",
    "update_adam",
    "update_momentum",
]
