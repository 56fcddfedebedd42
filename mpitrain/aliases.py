"""Environment variables of Horovod: what each of them sets here, and which set nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

__all__ = ["ALIASES", "Alias", "settings_from_aliases", "unused_aliases"]

_PREFIX = "HOROVOD_"


@dataclasses.dataclass(frozen=True, slots=True)
class Alias:
    """What a variable means.

    Attributes:
        settings: Names of the settings that it sets; see `Settings`.
        translate: Makes their text of its text; None where that leaves the settings as they are. Text that makes no
            sense is handed on, and refused with all others.
    """

    settings: tuple[str, ...]
    translate: Callable[[str], str | None] = str


def _at_least_one(text: str) -> str:
    # Horovod's 0 switches fusion off: with 1 byte at most, nothing is fused either.
    return "1" if text.strip() == "0" else text


def _never_if_set(text: str) -> str | None:
    return None if text.strip() in ("", "0") else "0"


def _level(text: str) -> str:
    return {"trace": "debug", "fatal": "critical"}.get(text.lower(), text)


def _file_of_timeline(text: str) -> str | None:
    # Horovod's word for a timeline that is started later, which it can be in any case.
    return None if text == "DYNAMIC" else text


ALIASES = {
    "HOROVOD_FUSION_THRESHOLD": Alias(("fusion_nbytes", "bucket_nbytes"), _at_least_one),
    "HOROVOD_LOG_LEVEL": Alias(("log_level",), _level),
    # Before the time limits, as it wins over them.
    "HOROVOD_STALL_CHECK_DISABLE": Alias(("stall_warning_s", "stall_shutdown_s"), _never_if_set),
    "HOROVOD_STALL_CHECK_TIME_SECONDS": Alias(("stall_warning_s",)),
    "HOROVOD_STALL_SHUTDOWN_TIME_SECONDS": Alias(("stall_shutdown_s",)),
    "HOROVOD_TIMELINE": Alias(("timeline",), _file_of_timeline),
}
"""Variables that mean something here. Where two set the same, the first one counts."""

# They ask for what is so in any case.
_FULFILLED = frozenset({"HOROVOD_DYNAMIC_PROCESS_SETS", "HOROVOD_LOG_HIDE_TIME"})
_FULFILLED_BY = {"HOROVOD_CONTROLLER": "mpi", "HOROVOD_CPU_OPERATIONS": "mpi", "HOROVOD_LOG_TIMESTAMP": "0"}
# They matter when Horovod is built; container images keep them set.
_BUILD = tuple(
    _PREFIX + word for word in ("WITH", "GPU", "CUDA", "NCCL_", "ROCM", "BUILD", "CMAKE", "ALLOW_MIXED", "CCL_", "DDL_")
)


def settings_from_aliases(environ: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """Return for each setting that a variable of Horovod sets the name of that variable, and the setting's text."""
    found: dict[str, tuple[str, str]] = {}
    for variable, alias in ALIASES.items():
        text = alias.translate(environ[variable]) if variable in environ else None
        if text is not None:
            for name in alias.settings:
                found.setdefault(name, (variable, text))
    return found


def unused_aliases(environ: Mapping[str, str]) -> list[str]:
    """Return the variables of Horovod that ask for something which they do not bring about here."""
    return sorted(
        name
        for name, text in environ.items()
        if name.startswith(_PREFIX)
        and name not in ALIASES
        and name not in _FULFILLED
        and not name.startswith(_BUILD)
        and text.strip().lower() not in ("", "0", "false", _FULFILLED_BY.get(name))
    )
