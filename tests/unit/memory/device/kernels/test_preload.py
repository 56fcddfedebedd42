"""NVRTC from a wheel is loaded for a CuPy that would not find it."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from mpitrain.memory.device.kernels import nvrtc


@pytest.fixture
def load(monkeypatch, tmp_path):
    """Preload for a version of CUDA, with wheels in `tmp_path`; return what was loaded, in its order."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "nvidia", raising=False)

    def load(version, *, found_by_system=False):
        loaded = []

        def load_library(name):
            loaded.append(name)
            if "/" not in name and not found_by_system:
                raise OSError(f"{name}: cannot open shared object file")

        monkeypatch.setattr(nvrtc.ctypes, "CDLL", load_library)
        nvrtc.preload_nvrtc(Cupy(version))
        return loaded

    return load


class Cupy:
    """As much of CuPy as tells its version of CUDA."""

    def __init__(self, version):
        self.cuda = SimpleNamespace(runtime=SimpleNamespace(runtimeGetVersion=lambda: version))


def add_wheel(site, folder, *names):
    lib = site / "nvidia" / folder / "lib"
    lib.mkdir(parents=True)
    for name in names:
        (lib / name).touch()
    return lib


@pytest.mark.parametrize(("version", "folder", "major"), [(12090, "cuda_nvrtc", 12), (13050, "cu13", 13)])
def test_library_of_the_wheel_is_loaded(load, tmp_path, version, folder, major):
    lib = add_wheel(tmp_path, folder, f"libnvrtc.so.{major}", f"libnvrtc-builtins.so.{major}.5")
    assert load(version) == [f"libnvrtc.so.{major}", str(lib / f"libnvrtc.so.{major}")]


def test_wheel_of_another_version_is_left_alone(load, tmp_path):
    add_wheel(tmp_path, "cuda_nvrtc", "libnvrtc.so.12")
    loaded = load(11080)
    assert loaded == ["libnvrtc.so.11"]


def test_library_of_the_system_comes_first(load, tmp_path):
    add_wheel(tmp_path, "cu13", "libnvrtc.so.13")
    assert load(13000, found_by_system=True) == ["libnvrtc.so.13"]
