"""What this host has: shared memory, cores, and how ranks are bound to them."""

from __future__ import annotations

import os
from collections.abc import Sequence

from mpitrain.config import Settings, copy_environment, unused_horovod_variables
from mpitrain.doctor.findings import Finding
from mpitrain.memory import Sample, can_read, free_shared_nbytes, total_shared_nbytes

__all__ = ["check_cross_memory", "check_host", "usable_cores"]

_MIB = 1 << 20
# Staging memory and the buckets of a model of some size, for every rank.
_SCANT_NBYTES = 256 * _MIB


def usable_cores() -> int:
    """Return on how many cores this process may run."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_host(local_size: int, cores_per_rank: float) -> list[Finding]:
    """Look at this host.

    Args:
        local_size: Ranks on it.
        cores_per_rank: Cores that the ranks of the host may use, divided by their number.
    """
    return [_check_shared_memory(local_size), _check_cores(local_size, cores_per_rank), _check_settings()]


def check_cross_memory(samples: Sequence[Sample]) -> Finding:
    """Try to read the memory of other processes of this host, of which these are samples."""
    name = "cross memory attach"
    if not _reads_memory():
        return Finding(name, "ok", "off, as MPITRAIN_CROSS_MEMORY or MPITRAIN_SHARED_MEMORY says")
    if can_read(samples):
        return Finding(name, "ok", "ranks of this host can read each other's arrays from where they lie")
    remedy = (
        "kernel.yama.ptrace_scope must be 0 or 1; with containers: one for all ranks of a host, with the right to "
        "ptrace (--cap-add=SYS_PTRACE)"
    )
    text = "ranks of this host cannot read each other's arrays; large ones are copied twice, more slowly"
    return Finding(name, "warning", text, remedy)


def _reads_memory() -> bool:
    """Whether the settings let ranks read each other's memory at all; what is wrong with them is told elsewhere."""
    try:
        settings = Settings.from_environ()
    except ValueError:
        return False
    return settings.shared_memory and settings.cross_memory


def _check_shared_memory(local_size: int) -> Finding:
    free, total = free_shared_nbytes(), total_shared_nbytes()
    if free is None or total is None:
        return Finding("shared memory", "ok", "its size cannot be asked on this system")
    text = f"{free / _MIB:.0f} of {total / _MIB:.0f} MiB are free, ranks on this host: {local_size}"
    if free >= _SCANT_NBYTES * local_size:
        return Finding("shared memory", "ok", text)
    remedy = "enlarge /dev/shm (containers: --shm-size=8g); what does not fit is exchanged by messages, more slowly"
    return Finding("shared memory", "warning", text, remedy)


def _check_cores(local_size: int, cores_per_rank: float) -> Finding:
    mine, all_cores = usable_cores(), os.cpu_count() or 1
    bound = "not bound" if mine == all_cores else f"bound to {mine}"
    text = f"{all_cores}, ranks on this host: {local_size}, this one is {bound}"
    if cores_per_rank < 1:
        remedy = "start fewer ranks on the host; those that wait sleep, so it works, more slowly"
        return Finding("cores", "warning", f"{text}; more ranks than cores", remedy)
    if mine == 1 and all_cores > local_size:
        remedy = "pass --bind-to none, so that the threads of torch and the progress thread find cores"
        return Finding("cores", "warning", text, remedy)
    return Finding("cores", "ok", text)


def _check_settings() -> Finding:
    try:
        settings = Settings.from_environ()
    except ValueError as error:
        return Finding("settings", "failure", str(error), "correct the variable")
    unused = unused_horovod_variables()
    if unused:
        return Finding("settings", "warning", f"{', '.join(unused)} have no effect", "see docs/horovod.md")
    names = sorted(name for name in copy_environment() if name.startswith(("MPITRAIN_", "HOROVOD_")))
    return Finding("settings", "ok", f"algorithm {settings.algorithm}; set: {', '.join(names) or 'none'}")
