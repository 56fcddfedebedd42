from __future__ import annotations

import gc
import threading
import weakref

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpitrain.memory import ScratchPool


def address(array):
    return array.__array_interface__["data"][0]


@given(st.integers(1, 1 << 22))
def test_acquire_gives_aligned_bytes_with_little_waste(nbytes):
    pool = ScratchPool()
    array = pool.acquire(nbytes)
    assert (array.dtype, array.shape) == (np.uint8, (nbytes,))
    assert address(array) % 64 == 0
    assert array.flags.writeable
    pool.release(array)
    assert nbytes <= pool.idle_nbytes <= max(4096, nbytes * 1.25) + 64


def test_acquire_of_nothing():
    pool = ScratchPool()
    array = pool.acquire(0)
    assert array.shape == (0,)
    pool.release(array)


def test_released_block_is_used_again_for_a_similar_size():
    pool = ScratchPool()
    first = pool.acquire(100_000)
    where = address(first)
    pool.release(first)
    assert address(pool.acquire(99_000)) == where
    assert pool.idle_nbytes == 0


def test_blocks_on_loan_do_not_overlap():
    pool = ScratchPool()
    arrays = [pool.acquire(5000) for _ in range(8)]
    for value, array in enumerate(arrays):
        array[:] = value
    assert [set(array.tolist()) for array in arrays] == [{value} for value in range(8)]


def test_release_takes_any_view_of_the_block():
    pool = ScratchPool()
    pool.release(pool.acquire(4096).view(np.float32)[:10].reshape(2, 5))
    assert pool.idle_nbytes > 0


def test_release_twice_or_of_a_stranger_is_refused():
    pool, other = ScratchPool(), ScratchPool()
    array = pool.acquire(10)
    with pytest.raises(ValueError, match=r"^array: is not on loan from this pool, got one of 10 bytes; release what"):
        other.release(array)
    pool.release(array)
    for stranger in (array, np.empty(10, np.uint8), np.empty(10, np.uint8)[:5]):
        with pytest.raises(ValueError, match=r"not on loan"):
            pool.release(stranger)


def test_longest_idle_blocks_are_freed_above_the_limit():
    pool = ScratchPool(max_idle_nbytes=20_000)
    arrays = [pool.acquire(8000) for _ in range(3)]
    where = [address(array) for array in arrays]
    freed = weakref.ref(arrays[0].base)
    for array in arrays:
        pool.release(array)
    del array, arrays
    gc.collect()
    assert freed() is None
    assert 16_000 <= pool.idle_nbytes <= 20_000
    assert [address(held) for held in (pool.acquire(8000), pool.acquire(8000))] == where[:0:-1]


def test_a_block_above_the_limit_is_not_kept():
    pool = ScratchPool(max_idle_nbytes=0)
    pool.release(pool.acquire(10))
    assert pool.idle_nbytes == 0


def test_clear_frees_what_is_idle():
    pool = ScratchPool()
    kept = pool.acquire(10)
    pool.release(pool.acquire(10))
    pool.clear()
    assert pool.idle_nbytes == 0
    pool.release(kept)
    assert pool.idle_nbytes > 0


def test_a_dropped_block_does_not_stay_in_memory():
    pool = ScratchPool()
    array = pool.acquire(10)
    block = weakref.ref(array.base)
    del array
    gc.collect()
    assert block() is None
    assert pool.idle_nbytes == 0


def test_borrow_releases_also_on_error():
    pool = ScratchPool()
    with pool.borrow(100) as array:
        assert array.shape == (100,)
    pool.clear()
    with pytest.raises(KeyError), pool.borrow(100):
        raise KeyError
    assert pool.idle_nbytes > 0


@pytest.mark.parametrize("make", [lambda: ScratchPool(-1), lambda: ScratchPool().acquire(-1)])
def test_negative_sizes_are_refused(make):
    with pytest.raises(ValueError, match=r"nbytes: must not be negative, got -1; "):
        make()


def test_threads_never_share_a_block():
    pool = ScratchPool(max_idle_nbytes=40_000)
    clashes = []

    def work(value):
        for turn in range(300):
            with pool.borrow(4000 + 1000 * (turn % 5)) as array:
                array[:] = value
                if (array != value).any():
                    clashes.append(value)

    threads = [threading.Thread(target=work, args=(value,)) for value in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert clashes == []
    assert 0 < pool.idle_nbytes <= 40_000


def test_what_was_lent_comes_back_when_the_last_view_is_gone():
    pool = ScratchPool()
    loan = pool.lend(10_000)
    where = address(loan)
    assert (loan.dtype, loan.shape, where % 64) == (np.uint8, (10_000,), 0)
    view = loan[16:32].view(np.float32)
    del loan
    gc.collect()
    assert address(pool.acquire(10_000)) != where
    del view
    gc.collect()
    assert address(pool.acquire(10_000)) == where


def test_nothing_can_be_lent():
    assert ScratchPool().lend(0).shape == (0,)


def test_memory_comes_from_the_allocator():
    asked = []

    def allocate(nbytes):
        asked.append(nbytes)
        return np.empty(nbytes, np.uint8)

    pool = ScratchPool(allocate=allocate)
    pool.release(pool.acquire(100_000))
    pool.release(pool.acquire(100_000))
    assert len(asked) == 1
    assert asked[0] >= 100_000
