from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest

from mpitrain.memory import DTYPES, as_dtype, dtype_named, dtype_of_numpy, dtype_of_torch

SUPPORTED = [
    "bool",
    *("int8", "int16", "int32", "int64"),
    *("uint8", "uint16", "uint32", "uint64"),
    *("float16", "bfloat16", "float32", "float64"),
    *("complex64", "complex128"),
]


def test_dtypes_are_the_supported_ones():
    assert list(DTYPES) == SUPPORTED


@pytest.mark.parametrize("name", SUPPORTED)
def test_description_agrees_with_torch(name):
    torch = pytest.importorskip("torch")
    torch_dtype = getattr(torch, name)
    dtype = dtype_of_torch(torch_dtype)
    assert dtype is dtype_of_torch(torch_dtype) is as_dtype(torch_dtype) is dtype_named(name) is as_dtype(name)
    assert dtype.itemsize == torch.empty(0, dtype=torch_dtype).element_size() == dtype.storage.itemsize
    assert (dtype.kind == "complex") == torch_dtype.is_complex
    assert (dtype.kind == "float") == torch_dtype.is_floating_point
    assert (dtype.kind in ("int", "float", "complex")) == torch_dtype.is_signed
    assert (dtype.kind == "bool") == (torch_dtype is torch.bool)


@pytest.mark.parametrize("name", [name for name in SUPPORTED if name != "bfloat16"])
def test_numpy_dtype_is_its_own_storage(name):
    dtype = dtype_of_numpy(np.dtype(name))
    assert dtype.name == name
    assert dtype.storage == np.dtype(name)
    assert as_dtype(np.dtype(name)) is as_dtype(np.dtype(name).type) is dtype


def test_bfloat16_is_stored_as_uint16_which_remains_an_integer():
    assert dtype_named("bfloat16").storage == np.uint16
    assert dtype_of_numpy(np.dtype(np.uint16)).name == "uint16"


def test_platform_aliases_are_the_same_type():
    assert dtype_of_numpy(np.dtype(np.longlong)).name == "int64"
    assert dtype_of_numpy(np.dtype(np.intp)).name == "int64"


@pytest.mark.parametrize("name", SUPPORTED)
def test_copies_are_the_same_object(name):
    dtype = dtype_named(name)
    assert pickle.loads(pickle.dumps(dtype)) is dtype
    assert copy.deepcopy(dtype) is dtype
    assert as_dtype(dtype) is dtype
    assert str(dtype) == name


def test_dtype_is_frozen():
    with pytest.raises(AttributeError):
        dtype_named("int8").itemsize = 2


@pytest.mark.parametrize(
    "value",
    [
        ">f4",
        "f4",
        "float",
        "object",
        np.dtype(">f4"),
        np.dtype("M8[s]"),
        np.dtype("U3"),
        np.dtype("i4,f8"),
        4,
        float,
    ],
)
def test_unsupported_dtype_lists_the_supported(value):
    with pytest.raises(TypeError, match=r"^grad: unsupported dtype, got .*; use one of bool, int8, .*bfloat16.*"):
        as_dtype(value, subject="grad")


def test_unsupported_torch_dtype_lists_the_supported():
    torch = pytest.importorskip("torch")
    for torch_dtype in (torch.complex32, torch.float8_e4m3fn, torch.qint8):
        with pytest.raises(TypeError, match=r"^grad: unsupported dtype, got torch\..*; use one of bool"):
            as_dtype(torch_dtype, subject="grad")
    for stranger in ("float32", "numpy.float32"):
        with pytest.raises(TypeError, match=r"unsupported dtype"):
            dtype_of_torch(stranger)
