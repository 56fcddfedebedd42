"""Whether hosts exist and can be reached, found out before anything is started."""

from __future__ import annotations

import concurrent.futures
import shutil
import socket
from collections.abc import Sequence

from mpitrain.errors import LaunchError
from mpitrain.launch.hosts import Host
from mpitrain.programs import run_program

__all__ = ["check_names", "is_known"]

_LIMIT_S = 10.0
_MOST_AT_ONCE = 32


def check_names(hosts: Sequence[Host]) -> None:
    """Refuse hosts that do not exist.

    Raises:
        LaunchError: Neither the system nor the configuration of ssh knows the names of some.
    """
    with concurrent.futures.ThreadPoolExecutor(_MOST_AT_ONCE) as pool:
        known = list(pool.map(lambda host: is_known(host.name), hosts))
    unknown = [host.name for host, answer in zip(hosts, known, strict=True) if not answer]
    if unknown:
        raise LaunchError(
            f"hosts: unknown, got {', '.join(unknown)}; correct the names, or add them to /etc/hosts or ~/.ssh/config"
        )


def is_known(name: str) -> bool:
    """Whether a name has an address, or ssh has one of its own for it."""
    return _has_address(name) or _ssh_knows(name)


def _has_address(name: str) -> bool:
    try:
        socket.getaddrinfo(name, None)
    except (OSError, UnicodeError):
        return False
    return True


def _ssh_knows(name: str) -> bool:
    """Ask ssh what it would do, without doing it."""
    ssh = shutil.which("ssh")
    if ssh is None:
        return False
    try:
        done = run_program([ssh, "-G", "--", name], limit_s=_LIMIT_S)
    except OSError:
        return False
    answers = dict(line.split(" ", 1) for line in done.output.splitlines() if " " in line)
    # Behind another host it is that one who knows the name.
    if {"proxyjump", "proxycommand"} & answers.keys():
        return True
    real = answers.get("hostname", name)
    return real != name and _has_address(real)
