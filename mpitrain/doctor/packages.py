"""Python, the packages that ranks use, and devices."""

from __future__ import annotations

import importlib.metadata
import platform
import sys

from mpitrain.doctor.findings import Finding
from mpitrain.errors import UnavailableError
from mpitrain.memory.device import describe_devices

__all__ = ["check_packages", "package_version"]

_CUPY_NAMES = ("cupy", "cupy-cuda12x", "cupy-cuda13x")


def package_version(name: str) -> str:
    """Return the version of an installed package, "" if it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def check_packages() -> list[Finding]:
    """Look at Python, mpi4py, torch and CuPy, and at the devices that the last two see."""
    versions = ", ".join(f"{name} {package_version(name) or 'missing'}" for name in ("mpi4py", "numpy"))
    return [
        Finding("Python", "ok", f"{platform.python_version()} at {sys.executable}, {versions}"),
        _check_torch(),
        _check_cupy(),
    ]


def _check_torch() -> Finding:
    if not package_version("torch"):
        return Finding("torch", "warning", "not installed", "pip install mpitrain[torch], unless NumPy arrays will do")
    try:
        import torch
    except Exception as error:  # noqa: BLE001  (whatever a broken installation raises)
        return Finding("torch", "failure", f"cannot be imported: {error}", "install it again, or the CPU build")
    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    threads = f"{torch.get_num_threads()} threads per rank"
    return Finding("torch", "ok", f"{torch.__version__}, {threads}, {', '.join(devices) or 'no device'}")


def _check_cupy() -> Finding:
    if not any(map(package_version, _CUPY_NAMES)):
        return Finding("CuPy", "ok", "not installed; only device arrays need it")
    try:
        return Finding("CuPy", "ok", describe_devices())
    except UnavailableError as error:
        return Finding("CuPy", "warning", str(error), "install the build that fits the driver, if devices are wanted")
