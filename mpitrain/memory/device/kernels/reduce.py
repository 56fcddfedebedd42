"""Launches `reduce_peers`: the arrays of n peers reduced into m arrays."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mpitrain.memory.device.kernels.loader import Array, address_of, common_head, launch, num_blocks_for
from mpitrain.memory.device.kernels.variants import reduce_variant
from mpitrain.memory.device.streams import Stream
from mpitrain.memory.dtypes import DType
from mpitrain.memory.reduction import ReduceOp, check_op

__all__ = ["MAX_PEERS", "reduce_peers"]

MAX_PEERS = 64
"""Most sources, and most targets, of one launch: their addresses are an argument of the kernel."""

_PEERS = np.dtype([("sources", np.uint64, MAX_PEERS), ("targets", np.uint64, MAX_PEERS)])


def reduce_peers(
    sources: Sequence[Array],
    targets: Sequence[Array],
    *,
    count: int,
    dtype: DType,
    op: ReduceOp,
    divisor: int | None = None,
    stream: Stream | None = None,
    most_blocks: int | None = None,
) -> None:
    """Reduce the arrays of n peers, in their order, and write the result to m arrays.

    Whoever reduces a slice writes it for all, so that all have the same bits; the 16-bit floats are accumulated in
    float32 and rounded once.

    Args:
        sources: First elements of the slices of all peers, in the order of their ranks.
        targets: First elements of where the result goes; may be sources, and must not overlap otherwise.
        count: Elements of a slice.
        dtype: Element type.
        op: Anything but adasum that is defined for the type.
        divisor: What the result is divided by; without, `len(sources)` for an average and else 1.
        stream: Stream of the current device; CuPy's current one without.
        most_blocks: Upper limit of blocks, to leave room for what else the device does.

    Raises:
        TypeError: The operation is not defined for the type.
        ValueError: Adasum, no source or target, or too many, or a divisor below 1.
        UnavailableError: The kernel cannot be compiled here.

    Cost: reads n * count elements and writes m * count, 16 bytes at a time where all arrays are aligned alike.
    """
    _check(len(sources), len(targets), dtype, op, divisor)
    if count == 0:
        return
    if divisor is None:
        divisor = len(sources) if op is ReduceOp.AVERAGE else 1
    source_addresses = [address_of(source) for source in sources]
    target_addresses = [address_of(target) for target in targets]
    peers = np.zeros((), _PEERS)
    peers["sources"][: len(sources)] = source_addresses
    peers["targets"][: len(targets)] = target_addresses
    group_count = 16 // dtype.itemsize
    # Buffers of peers are allocated alike, so their slices have the same place between two multiples of 16.
    places = {address % 16 for address in source_addresses + target_addresses}
    head = common_head([(place, dtype.itemsize) for place in places], group_count, count)
    num_accesses = count if head == count else -(-count // group_count)
    arguments = (
        peers,
        np.int32(len(sources)),
        np.int32(len(targets)),
        np.int64(count),
        np.int64(head),
        np.int64(divisor),
    )
    variant = reduce_variant(dtype, op, len(sources))
    launch(variant, "reduce_peers", num_blocks_for(num_accesses, most_blocks), arguments, stream)


def _check(num_sources: int, num_targets: int, dtype: DType, op: ReduceOp, divisor: int | None) -> None:
    check_op(op, dtype)
    if op is ReduceOp.ADASUM:
        raise ValueError(f"op: must be elementwise, got {op.name.lower()}; combine whole vectors instead")
    for name, number in (("sources", num_sources), ("targets", num_targets)):
        if not 1 <= number <= MAX_PEERS:
            raise ValueError(f"{name}: must be 1 to {MAX_PEERS} arrays, got {number}; reduce in several steps")
    if divisor is not None and divisor < 1:
        raise ValueError(f"divisor: must be at least 1, got {divisor}; pass the number of ranks")
    if divisor not in (None, 1) and dtype.kind == "bool":
        raise TypeError(f"divisor: cannot divide {dtype}, got {divisor}; convert to a number dtype")
