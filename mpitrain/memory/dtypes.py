"""Element types: one description for NumPy, torch and CuPy arrays.

A *storage* dtype is the NumPy dtype in which elements lie in a `FlatArray`. It is the
type itself wherever NumPy has one; bfloat16 is stored as uint16, bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import numpy as np

from mpitrain.memory.loaded import loaded_torch

__all__ = ["DTYPES", "DType", "as_dtype", "dtype_named", "dtype_of_numpy", "dtype_of_torch"]

Kind = Literal["bool", "int", "uint", "float", "complex"]


@dataclass(frozen=True, slots=True, eq=False)
class DType:
    """One element type. There is a single object per type, so `is` compares and hashing is cheap.

    Attributes:
        name: `"float32"`; the same word in NumPy and torch.
        itemsize: Size of one element in bytes.
        kind: What arithmetic applies.
        storage: NumPy dtype of the elements in a `FlatArray`.
    """

    name: str
    itemsize: int
    kind: Kind
    storage: np.dtype[Any]

    def __reduce__(self) -> tuple[object, tuple[str]]:
        """Pickle by name: a copy from another process is again the one object of its type."""
        return dtype_named, (self.name,)

    def __str__(self) -> str:
        return self.name


def _build() -> dict[str, DType]:
    names_of: dict[Kind, tuple[str, ...]] = {
        "bool": ("bool",),
        "int": ("int8", "int16", "int32", "int64"),
        "uint": ("uint8", "uint16", "uint32", "uint64"),
        "float": ("float16", "bfloat16", "float32", "float64"),
        "complex": ("complex64", "complex128"),
    }
    dtypes = {}
    for kind, names in names_of.items():
        for name in names:
            storage = np.dtype("uint16" if name == "bfloat16" else name)
            dtypes[name] = DType(name, storage.itemsize, kind, storage)
    return dtypes


DTYPES: Mapping[str, DType] = MappingProxyType(_build())
"""Every supported element type by name."""

# A NumPy dtype of foreign byte order is unequal to all keys, so it is refused like any other unknown one.
_BY_NUMPY: dict[np.dtype[Any], DType] = {dtype.storage: dtype for dtype in DTYPES.values() if dtype.name != "bfloat16"}
_BY_TORCH: dict[object, DType] = {}


def _unsupported(subject: str, got: object) -> TypeError:
    return TypeError(f"{subject}: unsupported dtype, got {got}; use one of {', '.join(DTYPES)}")


def dtype_named(name: str, *, subject: str = "dtype") -> DType:
    """Return the `DType` called `name`.

    Raises:
        TypeError: No such type; the message, which starts with `subject`, lists all.
    """
    dtype = DTYPES.get(name)
    if dtype is None:
        raise _unsupported(subject, repr(name))
    return dtype


def dtype_of_numpy(numpy_dtype: np.dtype[Any], *, subject: str = "dtype") -> DType:
    """Return the `DType` of a NumPy (or CuPy) dtype in native byte order.

    Raises:
        TypeError: The dtype is not supported; the message, which starts with `subject`, lists all.
    """
    dtype = _BY_NUMPY.get(numpy_dtype)
    if dtype is None:
        raise _unsupported(subject, repr(numpy_dtype))
    return dtype


def dtype_of_torch(torch_dtype: object, *, subject: str = "dtype") -> DType:
    """Return the `DType` of a torch dtype, which is known by its name.

    Raises:
        TypeError: The dtype is not supported; the message, which starts with `subject`, lists all.
    """
    dtype = _BY_TORCH.get(torch_dtype)
    if dtype is None:
        prefix, _, name = str(torch_dtype).partition(".")
        dtype = DTYPES.get(name)
        if prefix != "torch" or dtype is None:
            raise _unsupported(subject, torch_dtype)
        _BY_TORCH[torch_dtype] = dtype
    return dtype


def as_dtype(value: object, *, subject: str = "dtype") -> DType:
    """Return the `DType` that `value` means: a name, a NumPy or torch dtype, a scalar type or a `DType`.

    Raises:
        TypeError: It means no supported type; the message, which starts with `subject`, lists all.
    """
    if isinstance(value, DType):
        return value
    if isinstance(value, str):
        return dtype_named(value, subject=subject)
    if isinstance(value, np.dtype):
        return dtype_of_numpy(value, subject=subject)
    if isinstance(value, type) and issubclass(value, np.generic):
        return dtype_of_numpy(np.dtype(value), subject=subject)
    torch = loaded_torch()
    if torch is not None and isinstance(value, torch.dtype):
        return dtype_of_torch(value, subject=subject)
    raise _unsupported(subject, repr(value))
