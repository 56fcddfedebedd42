"""CuPy itself. Loaded here and nowhere else, and only when a device array is passed or a device asked for."""

from __future__ import annotations

import importlib
from typing import Any, TypeAlias

from mpitrain.errors import UnavailableError

__all__ = ["CupyArray", "CupyModule", "load_cupy"]

CupyModule: TypeAlias = Any
CupyArray: TypeAlias = Any


def load_cupy(subject: str) -> CupyModule:
    """Return the module `cupy`.

    Args:
        subject: What needs it, as messages say.

    Raises:
        UnavailableError: CuPy is not installed, or cannot be loaded.
    """
    try:
        return importlib.import_module("cupy")
    except ImportError as error:
        raise UnavailableError(
            f"{subject}: device arrays need CuPy, got {error}; "
            f"install cupy-cuda12x or cupy-cuda13x, or pass a host array"
        ) from error
