"""What stands in for CUDA when kernels are compiled for the host: barriers, shuffles, votes and the 16-bit floats."""

from __future__ import annotations

import numpy as np
import pytest

from tests.support.host_kernels import compile_host, needs_compiler

pytestmark = needs_compiler

KERNEL = '#define KERNEL extern "C" __global__ void __launch_bounds__(64)\n'


def run(body, *arrays, grid=1, block=64, parameters="int* out"):
    """Run a kernel of one function on host arrays."""
    module = compile_host(f"{KERNEL}KERNEL run({parameters}) {{ {body} }}\n")
    module.launch("run", (grid,), (block,), [array.ctypes.data for array in arrays])


def test_threads_and_blocks_have_their_numbers():
    out = np.zeros(5 * 64, np.int32)
    run("out[blockIdx.x * blockDim.x + threadIdx.x] = 1000 * gridDim.x + blockIdx.x * 64 + threadIdx.x;", out, grid=5)
    assert (out == 5000 + np.arange(5 * 64)).all()


def test_barrier_lets_nobody_through_before_all_are_there():
    out = np.zeros(4 * 64, np.int32)
    run(
        """
        __shared__ int shared[64];
        for (int turn = 0; turn < 4; ++turn) {
            shared[threadIdx.x] = 100 * turn + threadIdx.x;
            __syncthreads();
            out[turn * 64 + threadIdx.x] = shared[63 - threadIdx.x];
            __syncthreads();
        }
        """,
        out,
        grid=2,
    )
    assert (out.reshape(4, 64) == 100 * np.arange(4)[:, None] + np.arange(63, -1, -1)).all()


def test_threads_that_miss_a_barrier_are_reported():
    out = np.zeros(64, np.int32)
    with pytest.raises(RuntimeError, match=r"^run: its threads wait at different places$"):
        run("if (threadIdx.x != 7) __syncthreads(); out[threadIdx.x] = 1;", out)
    # The kernel that was left in the middle holds up no other.
    run("out[threadIdx.x] = 2; __syncthreads();", out)
    assert (out == 2).all()


def test_shuffles_and_votes_are_of_one_warp():
    out = np.zeros(4 * 64, np.int32)
    run(
        """
        const int thread = threadIdx.x;
        out[thread] = __shfl_xor_sync(0xFFFFFFFFu, thread, 5);
        out[64 + thread] = __shfl_up_sync(0xFFFFFFFFu, thread, 3);
        out[128 + thread] = __ballot_sync(0xFFFFFFFFu, thread % 3 == 0);
        out[192 + thread] = __popc(thread);
        """,
        out,
        grid=2,
    )
    threads = np.arange(64)
    lanes = threads % 32
    votes = [sum(1 << lane for lane in range(32) if (first + lane) % 3 == 0) for first in (0, 32)]
    found = out.reshape(4, 64)
    assert (found[0] == (threads ^ 5)).all()
    assert (found[1] == np.where(lanes < 3, threads, threads - 3)).all()
    assert (found[2].view(np.uint32) == np.repeat(np.array(votes, np.uint32), 32)).all()
    assert (found[3] == [int(thread).bit_count() for thread in threads]).all()


def test_halves_are_those_of_numpy():
    rng = np.random.default_rng(1)
    halves = np.arange(1 << 16, dtype=np.uint16)
    numbers = np.concatenate(
        [
            rng.integers(0, 1 << 32, 100_000, np.uint32).view(np.float32),
            # Halfway between neighbours, and a bit beside it.
            *[
                (halves.view(np.float16).astype(np.float32).view(np.uint32) + np.uint32(0x1000 + beside)).view(
                    np.float32
                )
                for beside in (-1, 0, 1)
            ],
            (rng.standard_normal(100_000) * 1e-6).astype(np.float32),
        ]
    )
    numbers = np.resize(numbers, -(-numbers.size // 64) * 64)
    wide, narrow = np.zeros(halves.size, np.float32), np.zeros(numbers.size, np.uint16)
    body = "out[blockIdx.x * 64 + threadIdx.x] = {}(in[blockIdx.x * 64 + threadIdx.x]);"
    for function, parameters, given, found in (
        ("float_of_half", "const uint16_t* in, float* out", halves, wide),
        ("half_of_float", "const float* in, uint16_t* out", numbers, narrow),
    ):
        run(body.format(function), given, found, grid=given.size // 64, parameters=parameters)
    assert np.array_equal(wide, halves.view(np.float16).astype(np.float32), equal_nan=True)
    with np.errstate(over="ignore"):
        expected = numbers.astype(np.float16)
    is_nan = np.isnan(numbers)
    assert np.array_equal(narrow[~is_nan], expected[~is_nan].view(np.uint16))
    assert np.isnan(narrow[is_nan].view(np.float16)).all()


def test_arguments_are_what_they_are():
    module = compile_host(
        KERNEL
        + "struct Pair { short first; double second; };\n"
        + "KERNEL run(double* out, int64_t whole, int32_t small, float single, double wide, Pair pair) {\n"
        + "    out[0] = whole; out[1] = small; out[2] = single; out[3] = wide;\n"
        + "    out[4] = pair.first; out[5] = pair.second;\n"
        + "}\n"
    )
    out = np.zeros(6)
    pair = np.zeros((), np.dtype([("first", np.int16), ("second", np.float64)], align=True))
    pair["first"], pair["second"] = -5, 0.75
    module.launch("run", (1,), (1,), [out.ctypes.data, -(2**40), np.int32(-3), np.float32(0.1), 0.1, pair])
    assert out.tolist() == [-(2.0**40), -3, float(np.float32(0.1)), 0.1, -5, 0.75]
    with pytest.raises(RuntimeError, match=r"^run: the number of arguments is not that of the kernel$"):
        module.launch("run", (1,), (1,), [out.ctypes.data])
    with pytest.raises(ValueError, match=r"^run: only one dimension"):
        module.launch("run", (1, 2), (1,), [out.ctypes.data])
    with pytest.raises(TypeError, match=r"^argument: must be a number or an array of one element, got ndarray"):
        module.launch("run", (1,), (1,), [out])


def test_errors_and_warnings_of_the_compiler_are_told():
    with pytest.raises(RuntimeError, match=r"(?s)^kernels: -DVALUE=1 does not compile.*unused variable"):
        compile_host(KERNEL + "KERNEL run(int* out) { int unused; *out = VALUE; }\n", ["-DVALUE=1", "--fmad=false"])
