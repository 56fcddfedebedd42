"""Kernels on the stand-in for CuPy, which runs them on the host, and on a device where there is one."""

from __future__ import annotations

import pytest

from mpitrain.memory.device.kernels import loader
from tests.support.devices import real_cupy
from tests.support.fake_cupy import stand_in
from tests.support.host_kernels import COMPILER


@pytest.fixture(scope="module", params=["stand-in", pytest.param("device", marks=pytest.mark.gpu)])
def cupy(request):
    """CuPy, or the stand-in in its place, where kernels are done soon after their launch."""
    if request.param == "device":
        yield real_cupy()
        return
    if COMPILER is None:
        pytest.skip("needs a C++ compiler, g++ or c++")
    with stand_in(latency_s=0) as module, pytest.MonkeyPatch.context() as patch:
        # So few blocks that each has several turns, also with little data.
        patch.setattr(loader, "_num_multiprocessors", lambda runtime, device: 1)
        patch.setattr(loader, "_BLOCKS_PER_SM", 2)
        yield module
