"""What the kernels of `kernels/` compute, in NumPy: each kernel has a twin of its name here.

Twins are the meaning of the kernels, and what these are tested against: bit for bit, but for the payload of a NaN and
for complex products. They work on host arrays of storage dtypes (`FlatArray.data`).
"""

from __future__ import annotations

from mpitrain.memory.twins.quantise import QUANTA, dequantise_blocks, quantise_blocks
from mpitrain.memory.twins.reduce import reduce_peers
from mpitrain.memory.twins.segments import pack_segments, unpack_segments
from mpitrain.memory.twins.select import select_values
from mpitrain.memory.twins.steps import AdamStep, MomentumStep
from mpitrain.memory.twins.update import update_adam, update_momentum
from mpitrain.memory.twins.wide import wide_dtype

__all__ = [
    "QUANTA",
    "AdamStep",
    "MomentumStep",
    "dequantise_blocks",
    "pack_segments",
    "quantise_blocks",
    "reduce_peers",
    "select_values",
    "unpack_segments",
    "update_adam",
    "update_momentum",
    "wide_dtype",
]
