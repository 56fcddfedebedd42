"""What Horovod scripts ask about the library they run on."""

from __future__ import annotations

from mpitrain.memory.device import is_installed
from mpitrain.torch.world import communicator

__all__ = [
    "ccl_built",
    "cuda_built",
    "ddl_built",
    "gloo_built",
    "gloo_enabled",
    "mpi_built",
    "mpi_enabled",
    "mpi_threads_supported",
    "nccl_built",
    "rocm_built",
]


def mpi_built() -> bool:
    """Whether MPI can be used: always."""
    return True


def mpi_enabled() -> bool:
    """Whether MPI is used: always."""
    return True


def mpi_threads_supported() -> bool:
    """Whether threads may call MPI at the same time, so that a script may use mpi4py as well: always, after `init`.

    Raises:
        NotInitializedError: Before `init`, which refuses an MPI that does not allow it.
    """
    communicator()
    return True


def gloo_built() -> bool:
    """Whether Gloo can be used: never."""
    return False


def gloo_enabled() -> bool:
    """Whether Gloo is used: never."""
    return False


def nccl_built() -> int:
    """Version of NCCL that reductions use: 0, as they use none."""
    return 0


def cuda_built() -> bool:
    """Whether tensors may lie on CUDA devices: where CuPy is installed."""
    return is_installed()


def rocm_built() -> bool:
    """Whether operations run on ROCm devices: they do not."""
    return False


def ddl_built() -> bool:
    """Whether IBM's DDL can be used: never."""
    return False


def ccl_built() -> bool:
    """Whether Intel's oneCCL can be used: never."""
    return False
