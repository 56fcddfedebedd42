"""Whether all ranks of a job are alike, and which is not."""

from __future__ import annotations

import collections
import dataclasses
import platform
import socket
from collections.abc import Sequence

import mpitrain
from mpitrain.config import Settings
from mpitrain.doctor.findings import Finding
from mpitrain.doctor.packages import package_version

__all__ = ["check_agreement", "facts_of_rank"]

_HOST = "host"
# Ranks that differ in these cannot work together; other differences may surprise.
_MUST_AGREE = ("mpitrain", "MPI library")
_SETTING = "setting "
_UNUSABLE = "settings that cannot be used"
_NOTHING = "nothing"


def facts_of_rank(library: str) -> dict[str, str]:
    """Return what ought to be the same on all ranks, and the host of this one.

    Args:
        library: Name and version of the MPI library.
    """
    try:
        settings = {
            f"{_SETTING}{name}": str(value) for name, value in dataclasses.asdict(Settings.from_environ()).items()
        }
    except ValueError as error:
        settings = {_UNUSABLE: str(error)}
    return {
        _HOST: socket.gethostname(),
        "mpitrain": mpitrain.__version__,
        "MPI library": library,
        "Python": platform.python_version(),
        **{name: package_version(name) or "missing" for name in ("mpi4py", "numpy", "torch")},
        **settings,
    }


def check_agreement(everybodys: Sequence[dict[str, str]]) -> list[Finding]:
    """Compare the facts of all ranks, by rank, with what most of them have."""
    nodes = collections.Counter(facts[_HOST] for facts in everybodys)
    listed = ", ".join(f"{host} {count}" for host, count in nodes.items())
    findings = [Finding("ranks", "ok", f"{len(everybodys)} on {len(nodes)} hosts: {listed}")]
    if len(set(nodes.values())) > 1:
        findings.append(Finding("balance", "ok", "hosts have different numbers of ranks; every algorithm takes that"))
    names = dict.fromkeys(name for facts in everybodys for name in facts if name != _HOST)
    odd = [finding for name in names for finding in _compare(name, everybodys)]
    return findings + (odd or [Finding("agreement", "ok", "versions and settings are the same on all ranks")])


def _compare(name: str, everybodys: Sequence[dict[str, str]]) -> list[Finding]:
    values = [facts.get(name, _NOTHING) for facts in everybodys]
    usual, _ = collections.Counter(values).most_common(1)[0]
    odd = [
        f"rank {rank} on {everybodys[rank][_HOST]} has {value}" for rank, value in enumerate(values) if value != usual
    ]
    if not odd:
        return []
    must_agree = name in _MUST_AGREE or name.startswith((_SETTING, _UNUSABLE))
    return [
        Finding(
            "agreement",
            "failure" if must_agree else "warning",
            f"{name}: {', '.join(odd)}; most have {usual}",
            "give all hosts the same environment, and all ranks the same variables",
        )
    ]
