"""Adasum as its paper defines it, on the vectors of all ranks at once, in float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[Any]


def combined(first: Vector, second: Vector) -> Vector:
    """Return the Adasum of two vectors."""
    both = float((first * second).sum())

    def weight(vector: Vector) -> float:
        squared = float((vector * vector).sum())
        return 1.0 - both / (2.0 * squared) if squared else 1.0

    return weight(first) * first + weight(second) * second


def adasum(vectors: Sequence[Vector]) -> Vector:
    """Return the Adasum of the vectors of all ranks.

    Pairs of neighbours first where their number is no power of two, as many as are too many; then the two halves, each
    in the same way.
    """
    wide = [vector.astype(np.float64) for vector in vectors]
    power = 1 << (len(wide).bit_length() - 1)
    extra = len(wide) - power
    core = [combined(wide[2 * pair], wide[2 * pair + 1]) for pair in range(extra)] + wide[2 * extra :]
    return _halves(core)


def _halves(vectors: list[Vector]) -> Vector:
    if len(vectors) == 1:
        return vectors[0]
    middle = len(vectors) // 2
    return combined(_halves(vectors[:middle]), _halves(vectors[middle:]))
