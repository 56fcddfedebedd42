"""Sources that are found and put together, kernels that are compiled once, and what to do when they are not."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from mpitrain.errors import UnavailableError
from mpitrain.memory import DTYPES, ReduceOp
from mpitrain.memory.device.kernels import THREADS, all_variants, loader, reduce_peers, source_text
from mpitrain.memory.device.kernels.loader import common_head, num_blocks_for
from tests.support.fake_cupy import stand_in
from tests.support.host_kernels import needs_compiler

KERNELS = Path(__file__).parents[5] / "kernels"
SOURCES = sorted(path.stem for path in KERNELS.glob("*.cu"))


def launch_reduction():
    data = np.ones(4, np.float32)
    reduce_peers([data.ctypes.data], [data.ctypes.data], count=4, dtype=DTYPES["float32"], op=ReduceOp.SUM)


@pytest.mark.parametrize("source", SOURCES)
def test_text_holds_all_it_needs_once(source):
    text = source_text(source)
    assert "#include" not in text
    included = [path for path in KERNELS.glob("*.cuh") if path.name in (KERNELS / f"{source}.cu").read_text()]
    assert included
    for path in included:
        assert text.count(path.read_text()) == 1


def test_every_source_has_variants():
    assert sorted({variant.source for variant in all_variants()}) == SOURCES


def test_variants_are_all_different():
    variants = [str(variant) for variant in all_variants()]
    assert len(variants) == len(set(variants))


def test_package_is_looked_at_before_the_repository(monkeypatch, tmp_path):
    module = tmp_path / "mpitrain" / "memory" / "device" / "kernels" / "loader.py"
    monkeypatch.setattr(loader, "__file__", str(module))
    source_text.cache_clear()
    try:
        with pytest.raises(UnavailableError, match=r"^kernels: their sources are missing, got neither .*; install"):
            source_text("reduce_peers")
        for folder in ("kernels", "mpitrain/_kernels"):
            (tmp_path / folder).mkdir(parents=True)
            (tmp_path / folder / "elements.cuh").write_text("// types\n")
            (tmp_path / folder / "reduce_peers.cu").write_text(f'#include "elements.cuh"\n// from {folder}\n')
            source_text.cache_clear()
            assert source_text("reduce_peers") == f"// types\n// from {folder}\n"
    finally:
        source_text.cache_clear()


@needs_compiler
def test_kernel_is_compiled_once_for_each_device(monkeypatch):
    with stand_in(num_devices=2, latency_s=0) as cupy:
        compiled = []
        raw_module = cupy.RawModule

        def counting(**arguments):
            compiled.append(cupy.cuda.runtime.getDevice())
            return raw_module(**arguments)

        monkeypatch.setattr(cupy, "RawModule", counting)
        for device in (0, 1, 0, 1):
            with cupy.cuda.Device(device):
                launch_reduction()
                cupy.cuda.get_current_stream().synchronize()
        assert compiled == [0, 1]


@needs_compiler
def test_kernel_runs_on_the_stream_that_is_given(fake_cupy):
    cupy = fake_cupy
    stream = cupy.cuda.Stream(non_blocking=True)
    data = np.ones(4, np.float32)
    cupy._machine.machine.hold(True)
    reduce_peers(
        [data.ctypes.data] * 3, [data.ctypes.data], count=4, dtype=DTYPES["float32"], op=ReduceOp.SUM, stream=stream
    )
    assert not stream.done
    assert cupy.cuda.get_current_stream().done
    cupy._machine.machine.hold(False)
    stream.synchronize()
    assert data.tolist() == [3, 3, 3, 3]


def test_missing_cupy_is_told_with_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(UnavailableError, match=r"^kernels: device arrays need CuPy, got .*; install cupy-cuda12x"):
        launch_reduction()


@pytest.mark.parametrize(
    ("failure", "told"),
    [
        ("syntax", r"does not compile .*kern.cu"),
        ("library", r"does not find NVRTC, .*; install nvidia-cuda-nvrtc-cu12"),
        ("device", r"no device can be used, got .*; look at nvidia-smi"),
    ],
)
def test_failure_to_compile_is_told_with_the_remedy(monkeypatch, failure, told):
    with stand_in() as cupy:
        errors = {
            "syntax": cupy.cuda.compiler.CompileException("kern.cu(3): error", "", "", ()),
            "library": RuntimeError("CuPy failed to load libnvrtc.so.12"),
            "device": cupy.cuda.runtime.CUDARuntimeError(100),
        }

        def failing(**arguments):
            raise errors[failure]

        monkeypatch.setattr(cupy, "RawModule", failing)
        with pytest.raises(UnavailableError, match=rf"^kernels: .*{told}"):
            launch_reduction()


def test_other_failures_stay_what_they_are(monkeypatch):
    with stand_in() as cupy:

        def failing(**arguments):
            raise RuntimeError("something else")

        monkeypatch.setattr(cupy, "RawModule", failing)
        with pytest.raises(RuntimeError, match=r"^something else$"):
            launch_reduction()


def test_blocks_fit_the_device_and_the_work(fake_cupy):
    runtime = fake_cupy.cuda.runtime
    most = 8 * runtime.deviceGetAttribute(runtime.cudaDevAttrMultiProcessorCount, 0)
    assert [num_blocks_for(count) for count in (1, THREADS, THREADS + 1, 1 << 40)] == [1, 1, 2, most]
    assert [num_blocks_for(1 << 40, limit) for limit in (3, 1 << 20)] == [3, most]


@pytest.mark.parametrize(
    ("arrays", "group_count", "head"),
    [
        ([(64, 4)], 4, 0),
        ([(68, 4), (100, 4)], 4, 3),
        ([(68, 4), (72, 4)], 4, 10),
        ([(65, 4)], 4, 10),
        ([(76, 4), (70, 2)], 4, 1),
        ([(72, 8), (34, 2)], 8, 7),
        ([(72, 8), (80, 8)], 1, 0),
        ([(0, 4), (68, 4)], 4, 10),
    ],
)
def test_head_is_where_all_groups_are_aligned(arrays, group_count, head):
    found = common_head(arrays, group_count, 10)
    assert found == head
    if found < 10:
        for address, itemsize in arrays:
            assert (address + found * itemsize) % min(16, group_count * itemsize) == 0


def test_head_is_within_the_arrays():
    assert common_head([(68, 4)], 4, 2) == 2
