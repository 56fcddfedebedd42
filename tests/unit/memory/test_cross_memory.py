"""Memory of other processes: read exactly, or refused with an error."""

from __future__ import annotations

import ctypes
import mmap
import subprocess
import sys

import numpy as np
import pytest

from mpitrain.errors import CommError
from mpitrain.memory import CrossMemory, address_of, can_read, cross_memory, make_sample

CHILD = """
import sys
import numpy as np
array = np.arange(300_007, dtype=np.float32) * 3 + 1
print(array.__array_interface__["data"][0], flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def _needs_attach():
    if not can_read([make_sample()]):
        pytest.skip("this system has no cross memory attach")


def test_what_another_process_holds_is_read_until_it_ends() -> None:
    with subprocess.Popen([sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        address = int(child.stdout.readline())
        found = np.zeros(300_007, np.float32)
        memory = CrossMemory([child.pid])
        memory.read(0, address, address_of(found), found.nbytes)
        np.testing.assert_array_equal(found, np.arange(300_007, dtype=np.float32) * 3 + 1)
        part = found[5:9]
        memory.read(0, address + 4 * 1000, address_of(part), part.nbytes)
        np.testing.assert_array_equal(part, [3001, 3004, 3007, 3010])
        child.kill()
        child.wait()
        with pytest.raises(CommError, match=r"rank 0 of this node: cannot be read .*; it may have ended"):
            memory.read(0, address, address_of(found), found.nbytes)


def test_what_ends_in_the_middle_is_an_error() -> None:
    memory = CrossMemory([make_sample().pid])
    pages = _two_pages_of_which_one_is_closed()
    found = np.empty(2 * mmap.PAGESIZE, np.uint8)
    memory.read(0, address_of(pages), address_of(found), mmap.PAGESIZE)
    assert set(found[: mmap.PAGESIZE].tolist()) == {7}
    with pytest.raises(CommError, match="cannot be read"):
        memory.read(0, address_of(pages), address_of(found), 2 * mmap.PAGESIZE)


def test_only_what_can_be_read_is_shown() -> None:
    array = np.arange(10.0)
    assert CrossMemory.readable_address(array) == address_of(array)
    assert CrossMemory.readable_address(array[3:4]) == address_of(array) + 24
    # Its last byte cannot be read.
    assert CrossMemory.readable_address(_two_pages_of_which_one_is_closed()) == 0


def test_another_process_is_not_taken_for_the_one_that_is_meant() -> None:
    sample = make_sample()
    assert make_sample() == sample
    assert can_read([sample, sample])
    assert not can_read([sample, sample._replace(token=bytes(16))])
    assert not can_read([sample._replace(address=8)])
    assert not can_read([sample._replace(pid=2**22 + 1)])


def test_without_such_a_function_nothing_can_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    sample = make_sample()
    monkeypatch.setattr(cross_memory, "_function", lambda: None)
    assert not can_read([sample])
    assert CrossMemory.readable_address(np.ones(3)) == 0
    with pytest.raises(CommError, match="no cross memory attach"):
        CrossMemory([sample.pid]).read(0, sample.address, sample.address, 1)


def _two_pages_of_which_one_is_closed() -> np.ndarray:
    """Two pages of memory, the second of which nobody may touch."""
    pages = np.frombuffer(mmap.mmap(-1, 2 * mmap.PAGESIZE), np.uint8)
    pages[:] = 7
    no_access = 0
    libc = ctypes.CDLL(None, use_errno=True)
    second = ctypes.c_void_p(address_of(pages) + mmap.PAGESIZE)
    assert libc.mprotect(second, ctypes.c_size_t(mmap.PAGESIZE), no_access) == 0
    return pages
