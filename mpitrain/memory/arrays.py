"""One flat view over NumPy, torch and CuPy arrays.

Everything below the torch face works on a `FlatArray`: a 1-D array over the memory of the
caller's own, and what is needed to describe it. Writing to the view writes to the array.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from mpitrain.memory import device as device_arrays
from mpitrain.memory.dtypes import DType, dtype_of_numpy, dtype_of_torch
from mpitrain.memory.loaded import TorchModule, loaded_torch
from mpitrain.memory.shared import NodeArray

__all__ = ["FlatArray", "allocate_like", "copy_of", "flat_view", "is_on_device"]

Tensor: TypeAlias = Any
CallersArray: TypeAlias = Any


@dataclass(frozen=True, slots=True, eq=False)
class FlatArray:
    """A caller's array as one contiguous run of elements.

    Attributes:
        data: Shape `(count,)`, dtype `dtype.storage`, sharing memory with the caller's array: a NumPy
            array on the host, a CuPy array on a device.
        dtype: Element type.
        shape: Shape of the caller's array.
        device: `"cpu"` or `"cuda:<number>"`.
        owner: The caller's array itself; kept alive for as long as the view.
    """

    data: NDArray[Any]
    dtype: DType
    shape: tuple[int, ...]
    device: str
    owner: object

    @property
    def count(self) -> int:
        """Number of elements."""
        return self.data.size

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.data.nbytes

    @property
    def is_host(self) -> bool:
        """Whether `data` is a NumPy array."""
        return self.device == "cpu"

    @property
    def is_expendable(self) -> bool:
        """Whether nobody minds if it is overwritten, as it is but the image of a caller's array."""
        return isinstance(self.owner, device_arrays.PinnedArray)

    def bytes(self) -> NDArray[np.uint8]:
        """Return the same memory as a 1-D array of bytes."""
        return self.data.view(np.uint8)


def flat_view(array: object, *, name: str = "array", writable: bool = False) -> FlatArray:
    """Return a view of a caller's array, without a copy.

    Args:
        array: `numpy.ndarray`, NumPy scalar (read only), torch tensor (also one that requires grad: the view is
            outside autograd), CuPy array, `FlatArray` (returned as it is), a `NodeArray`, or an object with
            `__array_interface__` or `__cuda_array_interface__`. Row-major contiguous; any shape, including `()`
            and empty.
        name: What messages call it.
        writable: Whether the view will be written to.

    Raises:
        TypeError: The kind of array, or its dtype, is not supported.
        ValueError: The array is not contiguous, or is read only though `writable`.
        UnavailableError: A device array without CuPy installed.
    """
    if type(array) is np.ndarray:
        return _view_numpy(array, array, name, writable)
    if isinstance(array, FlatArray):
        return array
    if isinstance(array, NodeArray):
        return FlatArray(array.flat, array.dtype, array.shape, array.device_name, array)
    torch = loaded_torch()
    if torch is not None and isinstance(array, torch.Tensor):
        return _view_torch(array, torch, name, writable)
    if device_arrays.is_device_array(array):
        return _view_device(array, array, None, name, writable)
    return _view_numpy(_as_numpy(array, name), array, name, writable)


def is_on_device(array: object) -> bool:
    """Tell whether an array of any library lies in device memory; what is no array does not."""
    if type(array) is np.ndarray or array is None:
        return False
    if isinstance(array, FlatArray):
        return not array.is_host
    if isinstance(array, NodeArray):
        return array.device_name != "cpu"
    torch = loaded_torch()
    if torch is not None and isinstance(array, torch.Tensor):
        return bool(cast("Any", array).is_cuda)
    return device_arrays.is_device_array(array)


def allocate_like(array: object, shape: int | Sequence[int]) -> CallersArray:
    """Return a new uninitialised array of the library, dtype and device of `array`; private if that is shared.

    Args:
        array: A `FlatArray` (its `owner` counts) or anything `flat_view` takes, contiguous or not.
        shape: Shape of the new array.

    Raises:
        TypeError: The kind of array, or its dtype, is not supported.
    """
    array = array.owner if isinstance(array, FlatArray) else array
    new_shape = (shape,) if isinstance(shape, int) else tuple(shape)
    if isinstance(array, NodeArray):
        return array.new(new_shape)
    torch = loaded_torch()
    if torch is not None and isinstance(array, torch.Tensor):
        return _plain(array, "array").new_empty(new_shape)
    if device_arrays.is_device_array(array):
        like = device_arrays.as_cupy(array)
        storage = dtype_of_numpy(like.dtype, subject="array").storage
        return device_arrays.empty(new_shape, storage, device_arrays.device_id(like))
    host = array if isinstance(array, np.ndarray) else _as_numpy(array, "array")
    return np.empty(new_shape, dtype_of_numpy(host.dtype, subject="array").storage)


def copy_of(array: object) -> CallersArray:
    """Return a new contiguous array of the same library, device, dtype, shape and contents.

    Args:
        array: A `FlatArray` (its `owner` is copied) or anything `flat_view` takes, contiguous or not.
            A copied tensor is outside autograd.

    Raises:
        TypeError: The kind of array, or its dtype, is not supported.
    """
    array = array.owner if isinstance(array, FlatArray) else array
    if isinstance(array, NodeArray):
        return array.copy()
    torch = loaded_torch()
    if torch is not None and isinstance(array, torch.Tensor):
        # A clone holds its values also where the original is a lazy conjugate or negative.
        return _plain(array, "array").clone(memory_format=torch.contiguous_format)
    if device_arrays.is_device_array(array):
        on_device = device_arrays.as_cupy(array)
        dtype_of_numpy(on_device.dtype, subject="array")
        return device_arrays.copy(on_device)
    host = _as_numpy(array, "array")
    dtype_of_numpy(host.dtype, subject="array")
    # numpy.ascontiguousarray would make a 0-dim array 1-dim.
    return np.array(host, order="C", copy=True)


def _view_numpy(host: NDArray[Any], owner: object, name: str, writable: bool) -> FlatArray:
    dtype = dtype_of_numpy(host.dtype, subject=name)
    flags = host.flags
    if not flags.c_contiguous:
        raise _not_contiguous(name, host.strides)
    if writable and not flags.writeable:
        raise _read_only(name)
    return FlatArray(host.reshape(-1), dtype, host.shape, "cpu", owner)


def _view_torch(tensor: Tensor, torch: TorchModule, name: str, writable: bool) -> FlatArray:
    dtype = dtype_of_torch(tensor.dtype, subject=name)
    bare = tensor.detach() if tensor.requires_grad else tensor
    if tensor.is_cuda:
        bits = _plain(bare, name)
        return _view_device(bits.view(torch.int16) if dtype.name == "bfloat16" else bits, tensor, dtype, name, writable)
    try:
        host = bare.numpy() if dtype.name != "bfloat16" else bare.view(torch.int16).numpy().view(np.uint16)
    except (RuntimeError, TypeError, NotImplementedError) as error:
        raise _explained(tensor, torch, name, error) from error
    if not host.flags.c_contiguous:
        raise _not_contiguous(name, tensor.stride())
    return FlatArray(host.reshape(-1), dtype, host.shape, "cpu", tensor)


def _view_device(
    array: object,
    owner: object,
    dtype: DType | None,
    name: str,
    writable: bool,
) -> FlatArray:
    view = device_arrays.as_cupy(array, name=name)
    if dtype is None:
        dtype = dtype_of_numpy(view.dtype, subject=name)
    if not view.flags.c_contiguous:
        raise _not_contiguous(name, view.strides)
    if writable and device_arrays.is_read_only(array):
        raise _read_only(name)
    data = view.reshape(-1)
    if data.dtype != dtype.storage:
        data = data.view(dtype.storage)
    return FlatArray(data, dtype, tuple(view.shape), f"cuda:{device_arrays.device_id(view)}", owner)


def _as_numpy(array: object, name: str) -> NDArray[Any]:
    """Return the base-class array over the memory of what NumPy itself can read without a copy."""
    if isinstance(array, np.ma.MaskedArray):
        raise TypeError(f"{name}: has a mask that a collective would ignore, got {_type(array)}; pass array.filled()")
    if isinstance(array, np.generic):
        host = np.asarray(array)
        # The scalar itself cannot change, so a write would be lost in the copy.
        host.flags.writeable = False
        return host
    if isinstance(array, np.ndarray) or hasattr(array, "__array_interface__"):
        return np.asarray(cast("Any", array))
    raise TypeError(
        f"{name}: must be an array in memory, got {_type(array)}; pass a numpy.ndarray, torch.Tensor or cupy.ndarray"
    )


def _plain(tensor: Tensor, name: str) -> Tensor:
    """Return a dense tensor of a supported dtype, outside autograd."""
    dtype_of_torch(tensor.dtype, subject=name)
    if str(tensor.layout) != "torch.strided":
        raise TypeError(f"{name}: must be dense, got layout {tensor.layout}; pass tensor.to_dense()")
    return tensor.detach()


def _explained(tensor: Tensor, torch: TorchModule, name: str, error: Exception) -> TypeError | ValueError:
    """Return what to tell the caller about a tensor that torch does not show to NumPy."""
    if tensor.layout is not torch.strided:
        return TypeError(f"{name}: must be dense, got layout {tensor.layout}; pass tensor.to_dense()")
    if not tensor.is_cpu:
        return TypeError(f"{name}: unsupported device, got {tensor.device}; pass tensor.cpu()")
    if tensor.is_conj():
        return ValueError(f"{name}: must hold its values, got a conjugate view; pass tensor.resolve_conj()")
    if tensor.is_neg():
        return ValueError(f"{name}: must hold its values, got a negative view; pass tensor.resolve_neg()")
    if not tensor.is_contiguous():
        return _not_contiguous(name, tensor.stride())
    return TypeError(f"{name}: memory is out of reach, got {_type(tensor)} ({error}); pass a plain tensor")


def _not_contiguous(name: str, strides: Sequence[int]) -> ValueError:
    return ValueError(f"{name}: must be contiguous, got strides {tuple(strides)}; pass a contiguous copy")


def _read_only(name: str) -> ValueError:
    return ValueError(f"{name}: must be writable, got a read-only array; pass a writable copy")


def _type(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"
