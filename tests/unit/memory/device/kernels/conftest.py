"""Kernels on the stand-in for CuPy, which runs them on the host."""

from __future__ import annotations

import pytest

from tests.support.fake_cupy import stand_in
from tests.support.host_kernels import COMPILER


@pytest.fixture(scope="module")
def cupy():
    """Put the stand-in in place of CuPy; kernels are done soon after their launch."""
    if COMPILER is None:
        pytest.skip("needs a C++ compiler, g++ or c++")
    with stand_in(latency_s=0) as module:
        yield module
