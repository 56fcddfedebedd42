"""Whether device arrays go straight to MPI on this machine: as set, as found out before, or as found out now."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import logging
from collections.abc import Iterator
from pathlib import Path

from mpitrain.collectives.table_file import Machine, store_text
from mpitrain.comm.cuda_aware import CudaAwareness, try_exchange, what_mpi_says
from mpitrain.config import Settings, cache_folder
from mpitrain.memory.device import describe_devices

__all__ = ["find_awareness"]

_log = logging.getLogger("mpitrain")

_SETTING = "MPITRAIN_CUDA_AWARE"


def find_awareness(machine: Machine, settings: Settings, device: int) -> CudaAwareness:
    """Find out whether this rank's device arrays go straight to MPI.

    What MPI says counts only if it says no; else another process tries. The answer is kept in the user's cache folder,
    for this machine, its devices and its MPI, so that it is found out once. This rank does so for itself, and the
    others for themselves; if they come to different answers, arrays go by way of the host.

    Args:
        machine: That this rank runs on, and its MPI.
        settings: "yes" and "no" go before everything.
        device: Number of the device.

    Raises:
        UnavailableError: CuPy is not installed, or sees no device.
    """
    if settings.cuda_aware != "auto":
        return CudaAwareness(settings.cuda_aware == "yes", f"{_SETTING}={settings.cuda_aware}")
    claim, source = what_mpi_says()
    if claim is False:
        return CudaAwareness(is_aware=False, source=source)
    tried = _tried(machine, describe_devices(), source, device)
    return CudaAwareness(tried.is_aware, f"{source}; {tried.source}")


@functools.cache
def _tried(machine: Machine, devices: str, source: str, device: int) -> CudaAwareness:
    """Return the outcome of a trial, of which there is one on a machine, whoever asks first."""
    try:
        path = cache_folder() / "cuda_aware" / f"{machine.fingerprint_with(devices, source)}.json"
        with _locked(path):
            if (known := _read(path)) is not None:
                return known
            tried = try_exchange(device)
            store_text(json.dumps({"is_aware": tried.is_aware, "source": tried.source}) + "\n", path)
            return tried
    except (OSError, RuntimeError) as error:  # no home, or none that can be written to
        _log.warning("trial of CUDA-aware MPI: not kept (%s); set %s=yes or no to spare it", error, _SETTING)
        return try_exchange(device)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a file's lock: the ranks of a node wait for the first one to have tried."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _read(path: Path) -> CudaAwareness | None:
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        return CudaAwareness(bool(known["is_aware"]), f"{known['source']} (kept in {path})")
    except (OSError, ValueError, KeyError, TypeError):
        return None
