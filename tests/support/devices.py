"""The devices of a test: the stand-in everywhere, and a real one where there is one."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest

from tests.support.fake_cupy import stand_in
from tests.support.host_kernels import needs_compiler

__all__ = ["each_cupy", "real_cupy"]


def real_cupy() -> ModuleType:
    """Return CuPy, or skip the test where there is none or no device."""
    if importlib.util.find_spec("cupy") is None:
        pytest.skip("CuPy is not installed")
    cupy = importlib.import_module("cupy")
    if not cupy.cuda.is_available():
        pytest.skip("no CUDA device")
    return cupy


@pytest.fixture(params=[pytest.param("stand-in", marks=needs_compiler), pytest.param("device", marks=pytest.mark.gpu)])
def each_cupy(request: Any) -> Iterator[ModuleType]:
    """Run a test on the stand-in, and on a device if there is one."""
    if request.param == "device":
        yield real_cupy()
    else:
        with stand_in() as cupy:
            yield cupy
