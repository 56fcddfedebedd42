"""Whether the MPI library takes buffers in device memory: what it says, and what happens when it gets one.

What it says may be wrong, or true of another transport than the one in use, and a library that is not CUDA-aware ends
the process that shows it device memory. So a process of its own tries it.
"""

from __future__ import annotations

import ctypes
import dataclasses
import sys
from pathlib import Path

import numpy as np

from mpitrain.config import copy_environment
from mpitrain.memory.device import as_cupy, empty, load_cupy, streams_of
from mpitrain.programs import run_program

__all__ = ["CudaAwareness", "exchange_with_itself", "try_exchange", "what_mpi_says"]

# Since MPI 4.1 a library may tell whose memory it takes. It names what was asked for at the start, so one that does not
# name CUDA may still take it.
_MEMORY_KINDS = "mpi_memory_alloc_kinds"
_QUERY = "MPIX_Query_cuda_support"
_MAPPED = "/proc/self/maps"
# What switches it on and off: Open MPI 5 and 4, MPICH, MPICH of Cray, MVAPICH2, MVAPICH, Intel MPI.
_VARIABLES = (
    "OMPI_MCA_opal_cuda_support",
    "OMPI_MCA_mpi_cuda_support",
    "MPIR_CVAR_ENABLE_GPU",
    "MPICH_GPU_SUPPORT_ENABLED",
    "MV2_USE_CUDA",
    "MVP_USE_CUDA",
    "I_MPI_OFFLOAD",
)
_OFF = ("", "0", "false", "no", "off", "disabled")
# By these a process knows that it is a rank of a job, which the one that tries is not.
_OF_A_RANK = ("PMIX_", "PMI_", "PRTE_", "OMPI_COMM_WORLD_", "OMPI_UNIVERSE_", "OMPI_MCA_orte_", "HYD", "MPI_LOCAL")
_OF_A_RANK_EXACTLY = ("OMPI_MCA_ess", "OMPI_MCA_pmix", "OMPI_MCA_initial_wdir", "PMIXFILE")
_LIMIT_S = 60.0
# Short messages are copied at once, long ones fetched later.
_COUNTS = (1, 3, 1 << 18)
_TRIAL = "import sys; from mpitrain.comm.cuda_aware import exchange_with_itself; exchange_with_itself(int(sys.argv[1]))"


@dataclasses.dataclass(frozen=True)
class CudaAwareness:
    """Whether device memory goes straight to MPI.

    Attributes:
        is_aware: It does.
        source: How that was found out.
    """

    is_aware: bool
    source: str


def what_mpi_says() -> tuple[bool | None, str]:
    """Ask the library of this process, and the variables that it heeds.

    Returns:
        Whether it is CUDA-aware, None if it does not say; and who says so.
    """
    from mpitrain.comm.start import MPI

    environment = copy_environment()
    given = {name: environment[name] for name in _VARIABLES if name in environment}
    for name, value in given.items():
        if value.lower() in _OFF:
            return False, f"{name}={value} in the environment"
    info = MPI.COMM_WORLD.Get_info()
    kinds = info.Get(_MEMORY_KINDS) or ""
    info.Free()
    if "cuda" in kinds.split(",") or "cuda:" in kinds:
        return True, f"its {_MEMORY_KINDS} are {kinds}"
    query = _find_function(_QUERY)
    if query is not None:
        return bool(query()), f"{_QUERY} says so"
    if given:
        return True, ", ".join(f"{name}={value}" for name, value in given.items()) + " in the environment"
    return None, f"it has no {_QUERY}"


def try_exchange(device: int, limit_s: float = _LIMIT_S) -> CudaAwareness:
    """Have another process, which is a job of its own, exchange device memory with itself.

    Args:
        device: Number of the device.
        limit_s: After so long it is ended.
    """
    try:
        command = [sys.executable, "-c", _TRIAL, str(device)]
        done = run_program(command, limit_s=limit_s, environ=_environment_of_no_rank())
    except TimeoutError:
        return CudaAwareness(is_aware=False, source=f"a trial did not end within {limit_s:.0f} s")
    if done.status == 0:
        return CudaAwareness(is_aware=True, source="a trial exchanged device memory")
    if done.status < 0:
        return CudaAwareness(is_aware=False, source=f"a trial was ended by {done.ending}")
    return CudaAwareness(is_aware=False, source=f"a trial failed: {done.last_words}")


def exchange_with_itself(device: int) -> None:
    """Send device memory to this process itself and look at what came; only in a process that may be lost.

    Raises:
        ValueError: Something else came.
    """
    from mpitrain.comm.start import MPI

    cupy = load_cupy("trial")
    compute = streams_of(device).compute
    for count in _COUNTS:
        expected = np.arange(count, dtype=np.float32) * 3 + count
        sent, received = (empty((count,), expected.dtype, device) for _ in range(2))
        with cupy.cuda.Device(device), compute:
            as_cupy(sent).set(expected)
            as_cupy(received).set(np.full(count, -1, np.float32))
        compute.synchronize()
        MPI.COMM_SELF.Sendrecv([sent, MPI.FLOAT], 0, 0, [received, MPI.FLOAT], 0, 0)
        with cupy.cuda.Device(device), compute:
            got = received.get()
        if not np.array_equal(got, expected):
            raise ValueError(f"trial: {count} elements came wrong, got {got[:3]} where {expected[:3]} were sent")


def _environment_of_no_rank() -> dict[str, str]:
    return {
        name: value
        for name, value in copy_environment().items()
        if not name.startswith(_OF_A_RANK) and name not in _OF_A_RANK_EXACTLY
    }


def _find_function(name: str) -> ctypes._NamedFuncPointer | None:
    """Return a function of the library, which is among the files that this process has mapped."""
    try:
        lines = Path(_MAPPED).read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:  # not Linux
        return None
    paths = dict.fromkeys(words[5] for line in lines if len(words := line.split(None, 5)) == 6)
    for path in paths:
        if Path(path).name.startswith(("libmpi.so", "libmpich.so", "libmpi_")):
            function: ctypes._NamedFuncPointer | None = getattr(ctypes.CDLL(path), name, None)
            if function is not None:
                return function
    return None
