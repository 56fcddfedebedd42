from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mpitrain.memory import DTYPES, FlatArray, allocate_like, copy_of, flat_view

torch = pytest.importorskip("torch")

HOST_DTYPES = [name for name in DTYPES if name != "bfloat16"]
SHAPES = [(), (1,), (7,), (0,), (3, 0, 2), (2, 3, 4), (1, 5, 1)]


def patterned(name, shape):
    """Values that differ from element to element, in any NumPy dtype."""
    count = int(np.prod(shape, dtype=int))
    return (np.arange(count) % 2 == 1 if name == "bool" else np.arange(1, count + 1)).astype(name).reshape(shape)


def tensor_of(name, shape):
    values = torch.arange(1, 1 + int(np.prod(shape, dtype=int)))
    return (values % 2 == 1 if name == "bool" else values).to(getattr(torch, name)).reshape(shape)


def test_import_loads_neither_torch_nor_cupy_nor_starts_mpi():
    program = (
        "import sys, mpitrain.memory as m, numpy as np; m.flat_view(np.ones(3)); m.copy_of(np.ones(3));"
        "x = np.ones(3, np.uint16); m.reduce_into(x, x, m.ReduceOp.SUM, m.DTYPES['bfloat16']);"
        "print(*({'torch', 'cupy', 'mpi4py.MPI'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "\n", "")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", HOST_DTYPES)
def test_view_of_numpy_shares_memory(name, shape):
    array = patterned(name, shape)
    flat = flat_view(array, writable=True)
    assert (flat.dtype.name, flat.shape, flat.device, flat.is_host) == (name, shape, "cpu", True)
    assert flat.owner is array
    assert flat.data.shape == (array.size,)
    assert (flat.count, flat.nbytes) == (array.size, array.nbytes)
    assert flat.bytes().tobytes() == array.tobytes()
    flat.data[:] = 0
    assert not array.any()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", DTYPES)
def test_view_of_tensor_shares_memory(name, shape):
    tensor = tensor_of(name, shape)
    flat = flat_view(tensor, writable=True)
    assert (flat.dtype.name, flat.shape, flat.device, flat.is_host) == (name, shape, "cpu", True)
    assert type(flat.shape) is tuple
    assert flat.owner is tensor
    assert flat.data.shape == (tensor.numel(),)
    assert flat.data.dtype == flat.dtype.storage
    assert flat.nbytes == tensor.numel() * tensor.element_size()
    if tensor.numel():
        assert flat.data.ctypes.data == tensor.data_ptr()
        assert flat.bytes().size == flat.nbytes
    flat.bytes()[:] = 0
    assert not tensor.to(torch.complex128).any()


@given(hnp.arrays(st.sampled_from(HOST_DTYPES), hnp.array_shapes(min_dims=0, min_side=0)))
def test_view_holds_the_elements_in_row_major_order(array):
    flat = flat_view(array)
    assert flat.data.tobytes() == array.tobytes("C")
    assert np.shares_memory(flat.data, array) or array.size == 0


def test_bytes_write_through():
    array = np.zeros(2, np.uint32)
    flat_view(array).bytes()[4] = 1
    assert array.tolist() == [0, 1] if sys.byteorder == "little" else [0, 1 << 24]


def test_bfloat16_view_has_the_bits_of_the_tensor():
    tensor = torch.tensor([1.0, -2.0, 0.0, float("inf")], dtype=torch.bfloat16)
    assert flat_view(tensor).data.tolist() == [0x3F80, 0xC000, 0, 0x7F80]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_view_of_tensor_that_requires_grad(dtype):
    leaf = torch.ones(3, dtype=dtype, requires_grad=True)
    for tensor in (leaf, leaf * 2, torch.nn.Parameter(torch.ones(3, dtype=dtype))):
        flat = flat_view(tensor, writable=True)
        flat.data[0] = 0
        assert flat.owner is tensor
        assert tensor[0].item() == 0
        assert tensor.requires_grad


def test_view_is_frozen():
    with pytest.raises(AttributeError):
        flat_view(np.ones(3)).device = "cuda:0"


def test_view_keeps_the_array_alive():
    flat = flat_view(torch.arange(5))
    assert flat.data.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("array", "strides"),
    [
        (np.ones((4, 4))[:, ::2], "(32, 16)"),
        (np.ones((2, 3)).T, "(8, 24)"),
        (np.ones(4)[::-1], "(-8,)"),
        (np.broadcast_to(np.ones(1), (3,)), "(0,)"),
        (torch.ones(4, 4)[:, ::2], "(4, 2)"),
        (torch.ones(2, 3).t(), "(1, 3)"),
        (torch.ones(1).expand(3), "(0,)"),
        (torch.ones(2, 3, dtype=torch.bfloat16).t(), "(1, 3)"),
        (torch.ones(2, 3, 4, 5).contiguous(memory_format=torch.channels_last), "(60, 1, 15, 3)"),
    ],
    ids=str,
)
def test_view_refuses_non_contiguous(array, strides):
    with pytest.raises(ValueError, match=r"^grad: must be contiguous, got strides .*; pass a contiguous copy$") as info:
        flat_view(array, name="grad")
    assert f"strides {strides};" in str(info.value)


def test_view_of_contiguous_slice():
    array = np.arange(10)
    flat_view(array[2:4], writable=True).data[:] = 0
    assert array.tolist() == [0, 1, 0, 0, 4, 5, 6, 7, 8, 9]
    tensor = torch.arange(10)
    flat_view(tensor[2:4], writable=True).data[:] = 0
    assert tensor.tolist() == [0, 1, 0, 0, 4, 5, 6, 7, 8, 9]


def test_read_only_is_refused_only_where_it_is_written():
    array = np.arange(3)
    array.flags.writeable = False
    assert flat_view(array).data.tolist() == [0, 1, 2]
    assert not flat_view(array).data.flags.writeable
    with pytest.raises(ValueError, match=r"^out: must be writable, got a read-only array; pass a writable copy$"):
        flat_view(array, name="out", writable=True)


def test_numpy_scalar_can_be_read_but_not_written():
    flat = flat_view(np.float32(3))
    assert (flat.shape, flat.dtype.name, flat.data.tolist()) == ((), "float32", [3.0])
    with pytest.raises(ValueError, match=r"must be writable"):
        flat_view(np.float32(3), writable=True)


def test_array_interface_object_is_viewed_in_place():
    class Exporter:
        def __init__(self, array):
            self.array = array
            self.__array_interface__ = array.__array_interface__

    exporter = Exporter(np.arange(6.0).reshape(2, 3))
    flat = flat_view(exporter, writable=True)
    assert (flat.shape, flat.owner) == ((2, 3), exporter)
    flat.data[5] = -1
    assert exporter.array[1, 2] == -1
    assert type(allocate_like(exporter, 2)) is np.ndarray
    assert copy_of(exporter).tolist() == [[0, 1, 2], [3, 4, -1]]


def test_ndarray_subclasses(tmp_path):
    mapped = np.memmap(tmp_path / "data", np.int32, "w+", shape=(2, 2))
    flat = flat_view(mapped, writable=True)
    flat.data[:] = 7
    assert type(flat.data) is np.ndarray
    assert mapped.tolist() == [[7, 7], [7, 7]]
    assert type(copy_of(mapped)) is np.ndarray
    masked = np.ma.masked_array([1.0, 2.0], mask=[True, False])
    for function in (flat_view, copy_of):
        with pytest.raises(TypeError, match=r"^array: has a mask that .*, got numpy\.ma\..*; pass array\.filled\(\)$"):
            function(masked)


@pytest.mark.parametrize("value", [[1.0, 2.0], 3.0, "abc", b"abc", bytearray(3), None, range(3)], ids=repr)
@pytest.mark.parametrize("function", [flat_view, copy_of, lambda array: allocate_like(array, 1)])
def test_what_is_no_array_is_refused(function, value):
    with pytest.raises(TypeError, match=r"^array: must be an array in memory, got builtins\..*; pass a numpy.ndarray"):
        function(value)


@pytest.mark.parametrize(
    "array",
    [np.array(["a"]), np.array([None]), np.ones(2, ">f8"), np.zeros(2, "i4,f4"), np.ones(2, np.longdouble)],
    ids=lambda array: str(array.dtype),
)
def test_unsupported_dtype_is_refused(array):
    for function in (flat_view, copy_of, lambda array: allocate_like(array, 1)):
        with pytest.raises(TypeError, match=r"^array: unsupported dtype, got .*; use one of bool"):
            function(array)


def test_unsupported_tensor_dtype_is_refused():
    tensor = torch.ones(2).to(torch.float8_e4m3fn)
    for function in (flat_view, copy_of, lambda array: allocate_like(array, 1)):
        with pytest.raises(TypeError, match=r"^array: unsupported dtype, got torch.float8_e4m3fn; use one of bool"):
            function(tensor)


def fake_tensor():
    with torch._subclasses.FakeTensorMode():
        return torch.empty(3)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: torch.eye(3).to_sparse(),
            TypeError,
            r"must be dense, got layout torch.sparse_coo; pass tensor.to_d",
        ),
        (lambda: torch.eye(3).bfloat16().to_sparse(), TypeError, "must be dense"),
        (
            lambda: torch.ones(3, device="meta"),
            TypeError,
            r"unsupported device, got meta; pass tensor.cpu\(\)",
        ),
        (
            lambda: torch.ones(3, dtype=torch.complex64).conj(),
            ValueError,
            r"conjugate view; pass tensor.resolve_conj",
        ),
        (
            lambda: torch.ones(3, dtype=torch.complex64).conj().imag,
            ValueError,
            r"negative view; pass tensor.resolve_n",
        ),
        (fake_tensor, TypeError, r"memory is out of reach, got torch\._subclasses.*FakeTensor"),
    ],
)
def test_tensor_without_values_in_memory_is_refused(make, error, message):
    with pytest.raises(error, match=f"^grad: .*{message}"):
        flat_view(make(), name="grad")


def test_copy_and_allocation_refuse_sparse_tensors():
    with pytest.raises(TypeError, match=r"^array: must be dense"):
        copy_of(torch.eye(3).to_sparse())
    with pytest.raises(TypeError, match=r"^array: must be dense"):
        allocate_like(torch.eye(3).to_sparse(), 3)


@pytest.mark.parametrize("shape", [(), (0,), (5,), (2, 3)])
@pytest.mark.parametrize(
    ("library", "name"), [*(("numpy", name) for name in HOST_DTYPES), *(("torch", name) for name in DTYPES)]
)
def test_allocate_like_keeps_library_and_dtype(library, name, shape):
    array = patterned(name, (2, 2)) if library == "numpy" else tensor_of(name, (2, 2))
    for like in (array, flat_view(array)):
        new = allocate_like(like, shape)
        assert type(new) is type(array)
        assert new.dtype == array.dtype
        assert tuple(new.shape) == shape
        assert not isinstance(like, FlatArray) or not np.shares_memory(flat_view(new).data, like.data)


def test_allocate_like_takes_a_count_and_non_contiguous_arrays():
    assert allocate_like(np.ones((4, 4))[::2], 3).shape == (3,)
    new = allocate_like(torch.nn.Parameter(torch.ones(2)), [2, 3])
    assert new.shape == (2, 3)
    assert not new.requires_grad


@given(hnp.arrays(st.sampled_from(HOST_DTYPES), hnp.array_shapes(min_dims=0, max_dims=3, min_side=0)), st.data())
def test_copy_of_numpy_is_contiguous_and_equal(array, data):
    view = array.transpose(data.draw(st.permutations(range(array.ndim))))
    new = copy_of(view)
    assert isinstance(new, np.ndarray)
    assert new.shape == view.shape
    assert new.flags.c_contiguous
    assert new.flags.writeable
    assert new.tobytes() == view.tobytes("C")
    assert not np.shares_memory(new, array)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", DTYPES)
def test_copy_of_tensor_is_contiguous_and_equal(name, shape):
    tensor = tensor_of(name, shape)
    for view in (tensor, tensor.permute(tuple(reversed(range(tensor.dim()))))):
        new = copy_of(view)
        assert (new.dtype, new.shape) == (view.dtype, view.shape)
        assert new.is_contiguous()
        assert torch.equal(new, view)
        assert new.numel() == 0 or new.data_ptr() != tensor.data_ptr()


def test_copy_of_resolves_lazy_views_and_leaves_autograd():
    tensor = torch.tensor([1 + 2j], requires_grad=True)
    for view in (tensor.conj(), tensor.conj().imag, tensor.expand(3), tensor[::2]):
        new = copy_of(view)
        assert flat_view(new).data.tolist() == view.tolist()
        assert not new.requires_grad


def test_copy_of_flat_view_has_the_shape_of_its_owner():
    array = np.arange(6).reshape(2, 3)
    assert copy_of(flat_view(array)).tolist() == array.tolist()
    assert copy_of(np.float32(2)).shape == ()


def test_arrays_work_while_torch_is_only_half_imported(monkeypatch):
    partial = type(sys)("torch")
    partial.__spec__ = type("Spec", (), {"_initializing": True})()
    monkeypatch.setitem(sys.modules, "torch", partial)
    assert flat_view(np.float32(1)).data.tolist() == [1]
    assert copy_of(np.arange(2)).tolist() == [0, 1]
