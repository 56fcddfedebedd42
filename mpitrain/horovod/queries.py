"""`horovod.common.util`, as far as scripts ask it what is there."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import mpitrain.torch as hvd

__all__ = [
    "ccl_built",
    "check_extension",
    "ddl_built",
    "extension_available",
    "gloo_built",
    "gpu_available",
    "is_iterable",
    "mpi_built",
    "nccl_built",
    "num_rank_is_power_2",
    "split_list",
]

Item = TypeVar("Item")


def check_extension(ext_name: str, ext_env_var: str = "", pkg_path: str = "", *args: str) -> None:
    """Check that there is a face for a framework.

    Args:
        ext_name: Such as "horovod.torch".
        ext_env_var: Not needed, as nothing is built; likewise all others.
        pkg_path: See above.
        args: See above.

    Raises:
        ImportError: There is none.
    """
    del ext_env_var, pkg_path, args
    if not extension_available(ext_name.removeprefix("horovod.")):
        raise ImportError(f"{ext_name}: is not there, only horovod.torch is")


def extension_available(ext_base_name: str, verbose: bool = False) -> bool:
    """Whether there is a face for a framework, such as "torch"."""
    del verbose
    return ext_base_name == "torch"


def gpu_available(ext_base_name: str, verbose: bool = False) -> bool:
    """Whether the operations of a face run on GPUs."""
    return extension_available(ext_base_name, verbose) and hvd.cuda_built()


def mpi_built(verbose: bool = False) -> bool:
    """See `mpitrain.torch.mpi_built`."""
    del verbose
    return hvd.mpi_built()


def gloo_built(verbose: bool = False) -> bool:
    """See `mpitrain.torch.gloo_built`."""
    del verbose
    return hvd.gloo_built()


def nccl_built(verbose: bool = False) -> int:
    """See `mpitrain.torch.nccl_built`."""
    del verbose
    return hvd.nccl_built()


def ddl_built(verbose: bool = False) -> bool:
    """See `mpitrain.torch.ddl_built`."""
    del verbose
    return hvd.ddl_built()


def ccl_built(verbose: bool = False) -> bool:
    """See `mpitrain.torch.ccl_built`."""
    del verbose
    return hvd.ccl_built()


def num_rank_is_power_2(num_rank: int) -> bool:
    """Whether a number of ranks is a power of two."""
    return num_rank > 0 and num_rank.bit_count() == 1


def split_list(values: Sequence[Item], num_parts: int) -> list[Sequence[Item]]:
    """Cut a list into parts of which the first ones are longer by one where it does not divide."""
    length, longer = divmod(len(values), num_parts)
    ends = [length * part + min(part, longer) for part in range(num_parts + 1)]
    return [values[begin:end] for begin, end in itertools.pairwise(ends)]


def is_iterable(value: Any) -> bool:
    """Whether one can iterate over a value."""
    return isinstance(value, Iterable) or hasattr(value, "__getitem__")
