"""Arrays in memory that the ranks of a node share, on the host or on devices; private ones where there is none."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable
from typing import Any, TypeVar

from mpitrain.collectives.device_direct import NUM_EVENTS, check_kernels
from mpitrain.collectives.node import Node
from mpitrain.collectives.reclaim import Reclaimer
from mpitrain.comm import Topology, Transport
from mpitrain.config import Settings
from mpitrain.errors import CollectiveError, UnavailableError
from mpitrain.memory import DType, NodeArray, Place, SharedArray, SharedDeviceArray
from mpitrain.memory.device import allocate_mapped_device, device_of

__all__ = ["NodeMemory"]

Array = TypeVar("Array", bound=NodeArray)

# Of the memory that this process has shared; other ranks have other numbers for it.
_numbers = itertools.count(1)

_log = logging.getLogger("mpitrain")


class NodeMemory:
    """What a communicator's arrays are allocated from.

    Args:
        transport: Of the communicator.
        topology: Of its ranks.
        settings: Whether device memory is shared.
        node: This rank's; None where nothing is shared.
        reclaimer: Frees what is dead on all ranks.

    Attributes:
        sharers: Stands for these ranks in this order; communicators that are duplicates have it in common.
    """

    def __init__(
        self, transport: Transport, topology: Topology, settings: Settings, node: Node | None, reclaimer: Reclaimer
    ) -> None:
        self._transport = transport
        self._topology = topology
        self._node = node
        self._shares_devices = settings.shared_device_memory
        self._reclaimer = reclaimer
        self.sharers = object()

    def allocate(self, shape: tuple[int, ...], dtype: DType, device: object = None) -> NodeArray:
        """Allocate an array; see `Communicator.allocate`."""
        number, problem = None, ""
        if device is not None:
            try:
                number = _number_of(device, self._topology.local_rank)
            except (UnavailableError, ValueError, RuntimeError) as error:
                problem = str(error) or type(error).__name__
        everybodys = self._transport.gather_everywhere((number is not None, problem))
        for rank, (_, text) in enumerate(everybodys):
            if text:
                raise UnavailableError(f"allocate: rank {rank} has no such device ({text})")
        are_on_devices = [is_on_device for is_on_device, _ in everybodys]
        if number is None:
            return self._on_host(shape, dtype, is_shared=not any(are_on_devices))
        return self._on_device(shape, dtype, number, is_shared=all(are_on_devices) and self._shares_devices)

    def reclaim(self) -> None:
        """Free what is dead on all ranks. Every rank must call."""
        self._reclaimer.reclaim()

    def _on_host(self, shape: tuple[int, ...], dtype: DType, *, is_shared: bool) -> SharedArray:
        if self._node is None or not is_shared:
            return self._private(lambda: SharedArray.private(dtype, shape))
        count = math.prod(shape)
        try:
            # A block of no bytes is not to be had.
            block, problem = self._node.allocate(max(1, count * dtype.itemsize)), ""
        except UnavailableError as error:
            block, problem = None, str(error)
        if self._has_everybody(problem, "private memory and messages") and block is not None:
            return SharedArray(dtype, shape, block.typed(dtype.storage, 0, count), self._node.rank, self._next_place())
        return self._private(lambda: SharedArray.private(dtype, shape))

    def _on_device(self, shape: tuple[int, ...], dtype: DType, device: int, *, is_shared: bool) -> SharedDeviceArray:
        node = self._node
        if node is None or not is_shared:
            return self._private(lambda: SharedDeviceArray.private(dtype, shape, device))
        count = math.prod(shape)
        block, problem = None, ""
        try:
            nbytes = max(1, count * dtype.itemsize)
            block = allocate_mapped_device(node.rank, nbytes, NUM_EVENTS, device, node.gather)
            check_kernels(block.views[node.rank])
        except (UnavailableError, RuntimeError, MemoryError) as error:
            problem = str(error) or type(error).__name__
        is_everywhere = self._has_everybody(problem, "private memory and copies through the host")
        if block is None:
            self._reclaimer.register_nothing()
        else:
            self._reclaimer.register(block, block.holdings.close)
        if is_everywhere and block is not None:
            views = block.typed(dtype.storage, 0, count)
            return SharedDeviceArray(dtype, shape, views, node.rank, self._next_place(), block=block)
        return self._private(lambda: SharedDeviceArray.private(dtype, shape, device))

    def _next_place(self) -> Place:
        """Return where a new shared array lies; every rank must call."""
        # The number of one rank, by which all know the array.
        return Place(self.sharers, self._transport.gather_everywhere(next(_numbers))[0], 0)

    def _private(self, make: Callable[[], Array]) -> Array:
        """Make an array that only this rank has; every rank must call.

        Raises:
            MemoryError, RuntimeError: This rank has no memory left for it, or a device that has failed.
            CollectiveError: Another one has not.
        """
        try:
            array = make()
        except (MemoryError, RuntimeError) as error:
            self._transport.gather_everywhere(str(error) or type(error).__name__)
            raise
        for rank, problem in enumerate(self._transport.gather_everywhere("")):
            if problem:
                raise CollectiveError(f"allocation: rank {rank} has no memory for it: {problem}")
        return array

    def _has_everybody(self, problem: str, instead: str) -> bool:
        """Whether all ranks of all nodes have got what they wanted; if not, rank 0 says so."""
        problems = [text for text in self._transport.gather_everywhere(problem) if text]
        if problems and self._transport.rank == 0:
            _log.warning("%s; going on with %s, which is slower", problems[0], instead)
        return not problems


def _number_of(device: Any, local_rank: int) -> int:
    """Return the number of a device, for a rank of this place on its node.

    Raises:
        UnavailableError: CuPy is not installed, or sees no such device.
        ValueError: It names no device of CUDA, or that of another rank.
    """
    own = device_of(local_rank)
    kind, _, number = (f"cuda:{device}" if isinstance(device, int) else str(device)).partition(":")
    if kind != "cuda" or not (number == "" or number.isdecimal()):
        raise ValueError(f"device: must be on CUDA, got {device!r}; pass a number, 'cuda' or 'cuda:<number>'")
    if number and int(number) != own:
        raise ValueError(f"device: local rank {local_rank} has cuda:{own}, got {device!r}; pass that one, or 'cuda'")
    return own
