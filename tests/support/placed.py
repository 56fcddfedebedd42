"""Arrays for kernels, as awkward as they come: at any address, full of special numbers, with watched surroundings."""

from __future__ import annotations

import numpy as np

from mpitrain.memory import DTYPES

__all__ = ["Placed", "bits_of", "random_elements", "same_numbers"]

_MARGIN_NBYTES = 64
_CANARY = 0xA5
_SPECIAL = {
    "float16": [0x0000, 0x8000, 0x0001, 0x83FF, 0x0400, 0x7BFF, 0x7C00, 0xFC00, 0x7E00, 0xFC01],
    "bfloat16": [0x0000, 0x8000, 0x0001, 0x807F, 0x0080, 0x7F7F, 0x7F80, 0xFF80, 0x7FC0, 0xFF81],
}


class Placed:
    """A copy of `contents` on the device, whose first element is `shift` elements after an address aligned to 64 bytes.

    Args:
        cupy: CuPy or the stand-in; the array is on the current device.
        contents: Any array of NumPy.
        shift: In elements.

    Attributes:
        address: Of the first element.
    """

    def __init__(self, cupy, contents, shift=0):
        contents = np.ascontiguousarray(contents)
        start = _MARGIN_NBYTES + shift * contents.itemsize
        memory = np.full(start + contents.nbytes + 2 * _MARGIN_NBYTES, _CANARY, np.uint8)
        memory[start : start + contents.nbytes] = contents.reshape(-1).view(np.uint8)
        self._dtype, self._shape = contents.dtype, contents.shape
        self._place = slice(start, start + contents.nbytes)
        self._download = cupy.asnumpy
        # CuPy aligns what it allocates to more than the margin.
        self._memory = cupy.asarray(memory)
        self.address = self._memory.data.ptr + start

    @property
    def array(self):
        """The contents, after what has been waited for; writing to it is not writing to the device."""
        return self._download(self._memory)[self._place].view(self._dtype).reshape(self._shape)

    def check_surroundings(self):
        """Fail if anything was written before or after the array."""
        memory = self._download(self._memory)
        assert (memory[: self._place.start] == _CANARY).all()
        assert (memory[self._place.stop :] == _CANARY).all()


def random_elements(rng, dtype, count, *, special=True):
    """Return an array of the storage of `dtype`: numbers of many sizes, and some of those that go wrong elsewhere."""
    dtype = DTYPES[dtype]
    if dtype.kind == "bool":
        return rng.integers(0, 2, count).astype(np.bool_)
    if dtype.kind in ("int", "uint"):
        limits = np.iinfo(dtype.storage)
        return rng.integers(limits.min, limits.max, count, dtype.storage, endpoint=True)
    if dtype.kind == "complex":
        part = {8: "float32", 16: "float64"}[dtype.itemsize]
        return random_elements(rng, part, 2 * count, special=special).view(dtype.storage)
    numbers = rng.standard_normal(count) * 2.0 ** rng.integers(-12, 12, count)
    if dtype.itemsize > 2:
        elements = numbers.astype(dtype.storage)
        info = np.finfo(dtype.storage)
        values = np.array(
            [0.0, -0.0, info.smallest_subnormal, -info.tiny, info.max, np.inf, -np.inf, np.nan], dtype.storage
        )
    else:
        single = numbers.astype(np.float32)
        bits = single.astype(np.float16).view(np.uint16) if dtype.name == "float16" else single.view(np.uint32) >> 16
        elements = bits.astype(np.uint16).view(dtype.storage)
        values = np.array(_SPECIAL[dtype.name], np.uint16).view(dtype.storage)
    if special:
        chosen = rng.random(count) < 0.1
        elements[chosen] = rng.choice(values, chosen.sum())
    return elements


def bits_of(array, dtype):
    """Return the bits of the elements; all NaN have the same, as no two machines agree on their payloads."""
    dtype = DTYPES[dtype]
    if dtype.kind == "complex":
        return bits_of(array.view(f"f{dtype.itemsize // 2}"), {8: "float32", 16: "float64"}[dtype.itemsize])
    bits = array.view(f"u{dtype.itemsize}").copy()
    if dtype.name == "bfloat16":
        bits[(bits & 0x7FFF) > 0x7F80] = 0x7FC0
    elif dtype.kind == "float":
        bits[np.isnan(array)] = np.array(np.nan, dtype.storage).view(bits.dtype)
    return bits


def same_numbers(found, expected, dtype):
    """Tell whether two arrays have the same bits, but for the payload of NaN."""
    return np.array_equal(bits_of(found, dtype), bits_of(expected, dtype))
