"""Which calls a communicator has seen before, and how to make them again."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpitrain.collectives.quick import Quick
from mpitrain.memory import SharedArray, copy_of, flat_view
from mpitrain.memory.loaded import loaded_torch

__all__ = ["QuickCalls"]

# Signatures that are remembered; beyond, all are forgotten.
_MOST_SIGNATURES = 512


class QuickCalls:
    """The signatures that a communicator has seen.

    Attributes:
        of_arrays: For NumPy arrays by (dtype, shape, op, algorithm), how to reduce into a new array.
        of_arrays_in_place: The same, in place.
    """

    def __init__(self) -> None:
        self.of_arrays: dict[Any, Quick] = {}
        self.of_arrays_in_place: dict[Any, Quick] = {}
        self._of_others: dict[Any, Quick] = {}

    def reduced(self, array: Any, op: Any, algorithm: str) -> Any:
        """Return the reduction of an array that is no NumPy array; None where it has to go the general way."""
        quick, _ = self._find(array, op, algorithm, in_place=False)
        if quick is None:
            return None
        try:
            result = copy_of(array)
        except MemoryError:
            return None  # the general way tells the others
        data = flat_view(result).data
        quick.run(data, data)
        return result

    def reduce(self, array: Any, op: Any, algorithm: str) -> bool:
        """Reduce an array that is no NumPy array in place; whether that was done, else it has to go the general way."""
        quick, data = self._find(array, op, algorithm, in_place=True)
        if quick is None:
            return False
        quick.run(data, data)
        return True

    def _find(self, array: Any, op: Any, algorithm: str, *, in_place: bool) -> tuple[Quick | None, Any]:
        """Return how to reduce `array`, and a view of it as a flat NumPy array."""
        kind: Any = type(array)
        if kind is SharedArray:
            kind = array.place
        try:
            quick = self._of_others[kind, array.dtype, array.shape, op, algorithm, in_place]
        except (AttributeError, KeyError, TypeError):
            return None, array
        host = array.flat if type(array) is SharedArray else _host(array)
        # Contiguous, aligned and writable; what is not gets its error, or its copy, on the general way.
        if host is None or not host.flags.carray:
            return None, array
        return quick, host.reshape(-1)

    def remember(self, array: Any, op: Any, algorithm: str, quick: Quick, *, in_place: bool) -> None:
        """Find it from now on, if the kind of array is one that can be looked at quickly."""
        if type(array) is np.ndarray:
            known = self.of_arrays_in_place if in_place else self.of_arrays
            _keep(known, (array.dtype, array.shape, op, algorithm), quick)
        elif type(array) is SharedArray:
            # Other ranks may pass another one of the same shape, which they must not.
            _keep(self._of_others, (array.place, array.dtype, array.shape, op, algorithm, in_place), quick)
        elif _host(array) is not None:
            _keep(self._of_others, (type(array), array.dtype, array.shape, op, algorithm, in_place), quick)


def _keep(known: dict[Any, Quick], signature: tuple[Any, ...], quick: Quick) -> None:
    if len(known) >= _MOST_SIGNATURES:
        known.clear()
    known[signature] = quick


def _host(array: Any) -> NDArray[Any] | None:
    """Return a torch CPU tensor as a NumPy array over the same memory; None for what is no such thing."""
    torch = loaded_torch()
    if torch is None or not isinstance(array, torch.Tensor) or not array.is_cpu or array.dtype is torch.bfloat16:
        return None
    try:
        return array.detach().numpy()  # type: ignore[no-any-return]
    except (RuntimeError, TypeError):
        return None
