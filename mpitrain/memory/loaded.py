"""Torch, if the process has loaded it already.

Plain collectives on NumPy and CuPy arrays work without torch, and importing torch
takes seconds, so nothing in this layer imports it. A caller who passes a tensor has
imported torch before.
"""

from __future__ import annotations

import sys
from typing import Any, TypeAlias

__all__ = ["TorchModule", "loaded_torch"]

TorchModule: TypeAlias = Any


def loaded_torch() -> TorchModule | None:
    """Return the torch module when its import is complete, else None."""
    torch = sys.modules.get("torch")
    # Another thread may be in the middle of `import torch`: the module is then listed, but half empty.
    if torch is None or getattr(torch.__spec__, "_initializing", False):
        return None
    return torch
