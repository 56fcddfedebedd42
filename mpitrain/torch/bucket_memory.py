"""Lays out buckets in memory that the ranks of a node share."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mpitrain.collectives import Communicator
from mpitrain.memory import NodeArray, SharedDeviceArray, as_dtype
from mpitrain.torch.arguments import Reduction
from mpitrain.torch.buckets import bucket_layout
from mpitrain.torch.device_buckets import DeviceBucket
from mpitrain.torch.slots import Bucket, Slot

__all__ = ["BucketMemory"]

Tensor = torch.Tensor

# Buckets begin on cache lines.
_LINE_NBYTES = 64


class BucketMemory:
    """What the buckets of some parameters lie in, and how they are laid out there.

    Args:
        reduction: Same on every rank.

    Attributes:
        arrays: By the kinds of device that the parameters lie on.
    """

    def __init__(self, reduction: Reduction) -> None:
        self._reduction = reduction
        self.arrays: dict[tuple[str, ...], NodeArray] = {}

    def lay_out(
        self, group: Communicator, comm: Communicator, slots: Sequence[Slot], order: Sequence[int]
    ) -> list[Bucket]:
        """Return the buckets for gradients that come in some order. Every rank must call.

        Args:
            group: Allocates their memory.
            comm: A duplicate of it, which reduces them.
            slots: All there are, by position.
            order: Their positions, those of the earliest gradients first.
        """
        for position in order:
            slots[position].bucket = -1
        in_order = [slots[position] for position in order]
        in_order = [slot for slot in in_order if not self._reduction.travels_by_name(is_sparse=slot.sparse_dim > 0)]
        keys = [(self._reduction.wire_dtype(slot.param), slot.devices) for slot in slots]
        sizes = [slot.param.numel() * dtype.itemsize for slot, (dtype, _) in zip(slots, keys, strict=True)]
        layout = bucket_layout(
            list(zip(sizes, keys, strict=True)),
            [slot.position for slot in in_order],
            bucket_nbytes=comm.settings.bucket_nbytes,
            first_bucket_nbytes=comm.settings.first_bucket_nbytes,
            groups=self._reduction.groups_among([slot.param for slot in slots]),
        )
        nbytes_of = [_aligned(sum(sizes[position] for position in members)) for members in layout]
        offsets: dict[tuple[str, ...], int] = {}
        for members, nbytes in zip(layout, nbytes_of, strict=True):
            devices = slots[members[0]].devices
            offsets[devices] = offsets.get(devices, 0) + nbytes
        memory = {devices: self._of(group, slots, devices, nbytes) for devices, nbytes in offsets.items()}
        offsets = dict.fromkeys(memory, 0)
        buckets: list[Bucket] = []
        for members, nbytes in zip(layout, nbytes_of, strict=True):
            in_bucket = [slots[position] for position in members]
            dtype, devices = as_dtype(keys[members[0]][0]), in_bucket[0].devices
            count = sum(slot.param.numel() for slot in in_bucket)
            array = memory[devices].part(dtype, offsets[devices], count)
            buckets.append(self._bucket(comm, len(buckets), in_bucket, array))
            offsets[devices] += nbytes
        return buckets

    def clear(self) -> None:
        """Let go of the memory; it lives as long as something refers to it."""
        self.arrays.clear()

    def _bucket(self, comm: Communicator, position: int, slots: list[Slot], array: NodeArray) -> Bucket:
        plan = comm.plan_allreduce_(array, op=self._reduction.op_in_buckets)
        if isinstance(array, SharedDeviceArray):
            return DeviceBucket(position, slots, array, plan)
        return Bucket(position, slots, array.tensor(), plan)

    def _of(self, group: Communicator, slots: Sequence[Slot], devices: tuple[str, ...], nbytes: int) -> NodeArray:
        """Return the memory for all buckets of some kinds of device, which the node shares; the same if it suffices."""
        memory = self.arrays.get(devices)
        if memory is not None and nbytes <= memory.flat.nbytes:
            # Gradients of the step that ends here lie where the next buckets will be.
            for slot in slots:
                if slot.devices == devices and slot.param.grad is not None:
                    slot.param.grad = slot.param.grad.clone()
        else:
            # The order of the parameters changes how they fit into buckets, but each adds less than a line.
            nbytes += len(slots) * _LINE_NBYTES
            param = next(slot.param for slot in slots if slot.devices == devices)
            device = param.device if param.device.type == "cuda" else None
            memory = self.arrays[devices] = group.allocate(nbytes, "uint8", device=device)
        return memory


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _LINE_NBYTES) * _LINE_NBYTES
