"""Arrays in the stand-in's device memory. Every operation on elements is work of the current stream."""

from __future__ import annotations

import math

import numpy as np
from cupy._machine import bytes_at, machine
from cupy.cuda import memory, runtime
from cupy.cuda.stream import get_current_stream


class ndarray:
    def __init__(self, shape, dtype=float, memptr=None, strides=None, order="C"):
        shape = (shape,) if isinstance(shape, int | np.integer) else tuple(shape)
        self.dtype = np.dtype(dtype)
        nbytes = math.prod(shape) * self.dtype.itemsize
        self.data = memory.alloc(nbytes) if memptr is None else memptr
        self.base = None
        if strides is None:
            flat = bytes_at(self.data.ptr, nbytes).view(self.dtype)
            self._host = flat.reshape(shape, order="F" if order == "F" else "C")
        else:
            self._host = _strided(self.data.ptr, shape, self.dtype, strides)

    @classmethod
    def _of(cls, host, data, base):
        array = cls.__new__(cls)
        array.dtype, array.data, array.base, array._host = host.dtype, data, base, host
        return array

    def _view_of(self, host):
        offset = host.__array_interface__["data"][0] - self.data.ptr if host.size else 0
        return ndarray._of(host, self.data + offset, self if self.base is None else self.base)

    # What it is

    shape = property(lambda self: self._host.shape)
    strides = property(lambda self: self._host.strides)
    size = property(lambda self: self._host.size)
    nbytes = property(lambda self: self._host.nbytes)
    itemsize = property(lambda self: self._host.itemsize)
    ndim = property(lambda self: self._host.ndim)
    flags = property(lambda self: self._host.flags)
    device = property(lambda self: self.data.device)
    T = property(lambda self: self._view_of(self._host.T))

    @property
    def __cuda_array_interface__(self):
        return {
            "shape": self.shape,
            "typestr": self.dtype.str,
            "descr": self.dtype.descr,
            "strides": None if self.flags.c_contiguous else self.strides,
            "data": (self.data.ptr, False),
            "version": 3,
            # 1 is the number of the default stream in this protocol.
            "stream": get_current_stream().ptr or 1,
        }

    def __array__(self, dtype=None, copy=None):
        raise TypeError("Implicit conversion to a NumPy array is not allowed. Please use `.get()`")

    def __len__(self):
        return len(self._host)

    def __bool__(self):
        return bool(self.get())

    def __float__(self):
        return float(self.get())

    def __int__(self):
        return int(self.get())

    def __repr__(self):
        # The values would have to be waited for.
        return f"<array {self.shape} of {self.dtype} on device {self.data.device_id}>"

    # Other views of the memory

    def view(self, dtype=None, type=None):  # noqa: A002
        return self._view_of(self._host if dtype is None else self._host.view(dtype))

    def reshape(self, *shape, order="C"):
        view = self._host.reshape(*shape, order=order)
        if self.size and not np.shares_memory(view, self._host):
            return self.copy().reshape(*shape, order=order)
        return self._view_of(view)

    def ravel(self, order="C"):
        return self.reshape(-1, order=order)

    def __getitem__(self, index):
        return self._view_of(self._host[_basic(index)])

    # To the host and back

    def get(self, stream=None, order="C", out=None, blocking=True):
        stream = get_current_stream() if stream is None else stream
        target = np.empty(self.shape, self.dtype, order) if out is None else out
        source = self._host
        machine.enqueue(machine.queue(stream.ptr, self.data.device_id), lambda: np.copyto(target, source))
        if blocking:
            stream.synchronize()
        return target

    def set(self, arr, stream=None):
        stream = get_current_stream() if stream is None else stream
        taken, target = np.array(arr, self.dtype, copy=True), self._host
        if taken.shape != self.shape:
            raise ValueError("Shape mismatch")
        machine.enqueue(machine.queue(stream.ptr, self.data.device_id), lambda: np.copyto(target, taken))

    def tolist(self):
        return self.get().tolist()

    def item(self):
        return self.get().item()

    # Work on elements

    def _enqueue(self, function):
        if self.data.device_id != runtime.getDevice():
            # The real one would go over the peer access of the devices, if there is any.
            raise ValueError(f"array of device {self.data.device_id} used on device {runtime.getDevice()}")
        machine.enqueue(machine.queue(get_current_stream().ptr, self.data.device_id), function)

    def __setitem__(self, index, value):
        target = self._host[_basic(index)]
        source = _operand(value)
        self._enqueue(lambda: np.copyto(target, source, casting="unsafe"))

    def fill(self, value):
        self[...] = value

    def copy(self, order="C"):
        made = ndarray(self.shape, self.dtype, order=order)
        made[...] = self
        return made

    def astype(self, dtype, order="K", casting=None, subok=None, copy=True):
        made = ndarray(self.shape, dtype)
        made[...] = self
        return made

    def _elementwise(self, ufunc, *operands, out=None):
        hosts = [_operand(operand) for operand in operands]
        if out is None:
            shape = np.broadcast_shapes(*(np.shape(host) for host in hosts))
            samples = [np.ones(1, host.dtype) if isinstance(host, np.ndarray) else host for host in hosts]
            out = ndarray(shape, ufunc(*samples).dtype)
        target = out._host
        self._enqueue(lambda: ufunc(*hosts, out=target, casting="unsafe"))
        return out

    def sum(self):
        made, source = ndarray((), self.dtype), self._host
        self._enqueue(lambda: np.copyto(made._host, source.sum(dtype=source.dtype)))
        return made

    def all(self):
        made, source = ndarray((), bool), self._host
        self._enqueue(lambda: np.copyto(made._host, source.all()))
        return made


def _basic(index):
    """Return an index that gives a view also where it names one element."""
    index = index if isinstance(index, tuple) else (index,)
    return index if Ellipsis in index else (*index, Ellipsis)


def _operand(value):
    if isinstance(value, ndarray):
        return value._host
    if isinstance(value, np.ndarray) and value.ndim:
        raise TypeError(f"Unsupported type {type(value)}")
    return value


def _strided(address, shape, dtype, strides):
    if 0 in shape:
        return np.empty(shape, dtype)
    last = sum((length - 1) * stride for length, stride in zip(shape, strides, strict=True))
    memory_bytes = bytes_at(address, last + dtype.itemsize)
    return np.ndarray(shape, dtype, memory_bytes, 0, strides)


def _method(ufunc, *, reflected=False, in_place=False):
    def method(self, *others):
        operands = (others[0], self) if reflected else (self, *others)
        return self._elementwise(ufunc, *operands, out=self if in_place else None)

    return method


for _name, _ufunc in {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "truediv": np.true_divide,
    "pow": np.power,
}.items():
    setattr(ndarray, f"__{_name}__", _method(_ufunc))
    setattr(ndarray, f"__r{_name}__", _method(_ufunc, reflected=True))
    setattr(ndarray, f"__i{_name}__", _method(_ufunc, in_place=True))
for _name, _ufunc in {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "gt": np.greater}.items():
    setattr(ndarray, f"__{_name}__", _method(_ufunc))
for _name, _ufunc in {"neg": np.negative, "abs": np.absolute}.items():
    setattr(ndarray, f"__{_name}__", _method(_ufunc))


def empty(shape, dtype=float, order="C"):
    return ndarray(shape, dtype, order=order)


def full(shape, fill_value, dtype=None, order="C"):
    made = empty(shape, np.asarray(fill_value).dtype if dtype is None else dtype, order)
    made.fill(fill_value)
    return made


def zeros(shape, dtype=float, order="C"):
    return full(shape, 0, dtype, order)


def ones(shape, dtype=float, order="C"):
    return full(shape, 1, dtype, order)


def empty_like(prototype, dtype=None, order="K", subok=None, shape=None):
    return empty(prototype.shape if shape is None else shape, prototype.dtype if dtype is None else dtype)


def zeros_like(a, dtype=None, order="K", subok=None, shape=None):
    return zeros(a.shape if shape is None else shape, a.dtype if dtype is None else dtype)


def arange(start, stop=None, step=1, dtype=None):
    return array(np.arange(start, stop, step, dtype) if stop is not None else np.arange(start, dtype=dtype))


def array(obj, dtype=None, copy=True, order="K", subok=False, ndmin=0, *, blocking=False):
    if hasattr(obj, "__cuda_array_interface__"):
        source = _imported(obj)
        made = empty(source.shape, source.dtype if dtype is None else dtype, "C" if order == "K" else order)
        made[...] = source
        return made
    host = np.array(obj, dtype)
    made = empty(host.shape, host.dtype)
    made.set(host)
    if blocking:
        get_current_stream().synchronize()
    return made


def asarray(a, dtype=None, order=None, *, copy=None, blocking=False):
    if not hasattr(a, "__cuda_array_interface__") or copy:
        return array(a, dtype, order=order or "K", blocking=blocking)
    view = _imported(a)
    return view if dtype in (None, view.dtype) else view.astype(dtype)


def _imported(obj):
    if isinstance(obj, ndarray):
        return obj
    description = obj.__cuda_array_interface__
    address = description["data"][0]
    shape, dtype = description["shape"], np.dtype(description["typestr"])
    stream = description.get("stream")
    if description["version"] >= 3 and stream is not None:
        runtime.streamSynchronize(stream)
    strides = description.get("strides")
    nbytes = math.prod(shape) * dtype.itemsize
    owned = memory.UnownedMemory(address, nbytes, obj)
    return ndarray(shape, dtype, memory.MemoryPointer(owned, 0), strides)


def asnumpy(a, stream=None, order="C", out=None, *, blocking=True):
    if isinstance(a, ndarray):
        return a.get(stream=stream, order=order, out=out, blocking=blocking)
    return np.asarray(a, order=order)


def concatenate(tup, axis=0, out=None, *, dtype=None, casting="same_kind"):
    parts = list(tup)
    shape = list(parts[0].shape)
    shape[axis] = sum(part.shape[axis] for part in parts)
    made = empty(tuple(shape), parts[0].dtype) if out is None else out
    hosts, target = [part._host for part in parts], made._host
    made._enqueue(lambda: np.concatenate(hosts, axis, target))
    return made


def may_share_memory(a, b, max_work=None):
    return np.may_share_memory(a._host, b._host)
