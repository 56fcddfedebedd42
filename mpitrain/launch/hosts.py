"""Lists of hosts: what `-H` takes, and the hostfiles of Open MPI, MPICH, Intel MPI and batch systems.

    node0 slots=4 max_slots=8     Open MPI
    node0:4                       MPICH, Intel MPI
    node0                         a batch system's, one line for each rank

A slot is room for one rank. A host that is listed again gets the slots of all its lines.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from mpitrain.errors import LaunchError

__all__ = ["Host", "parse_hosts", "place_ranks", "read_hostfile"]

# The names of the Domain Name System and addresses of IPv4, with the underscores that some sites have. Nothing that
# begins with a dash gets through, which ssh would take for an option, and nothing that means something to a shell.
_NAME = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_])?", re.ASCII)
_LONGEST_NAME = 253
_MOST_SLOTS = 1 << 20


@dataclasses.dataclass(frozen=True, slots=True)
class Host:
    """A host of a job.

    Attributes:
        name: Name or address.
        slots: How many ranks it takes.
    """

    name: str
    slots: int


def parse_hosts(text: str) -> list[Host]:
    """Read a list such as "node0:4,node1:4"; a host without a number has one slot.

    Raises:
        LaunchError: There is no host in it, or one that cannot be used.
    """
    return _merge(_parse_item(item.strip(), f"hosts {text!r}") for item in text.split(","))


def read_hostfile(path: Path) -> list[Host]:
    """Read a hostfile, in whichever of the forms above each line is. What follows a `#` is a comment.

    Raises:
        LaunchError: It cannot be read, names no host, or has an entry that cannot be used; the message has the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is not text"
        raise LaunchError(
            f"hostfile {path}: cannot be read, {reason}; name a text file with a host on each line"
        ) from None
    hosts = []
    for number, line in enumerate(lines, start=1):
        entry = line.partition("#")[0].strip()
        if entry:
            hosts.append(_parse_line(entry, f"hostfile {path}, line {number}"))
    if not hosts:
        raise LaunchError(f"hostfile {path}: names no host, got {len(lines)} lines; write one such as: node0 slots=4")
    return _merge(hosts)


def place_ranks(hosts: Sequence[Host], size: int | None) -> list[Host]:
    """Return how many of `size` ranks each host gets: hosts are filled in order, and those that get none left out.

    Args:
        hosts: Where ranks may run.
        size: Number of ranks; None is as many as there are slots.

    Raises:
        LaunchError: There are more ranks than slots.
    """
    num_slots = sum(host.slots for host in hosts)
    size = num_slots if size is None else size
    if size > num_slots:
        listed = ",".join(f"{host.name}:{host.slots}" for host in hosts)
        raise LaunchError(f"ranks: more than there are slots, got {size} for {num_slots} ({listed}); list more slots")
    placed = []
    for host in hosts:
        if size:
            placed.append(Host(host.name, min(size, host.slots)))
            size -= placed[-1].slots
    return placed


def _parse_line(entry: str, where: str) -> Host:
    # Open MPI allows blanks around the sign.
    first, *words = re.sub(r"\s*=\s*", "=", entry).split()
    host = _parse_item(first, where)
    for word in words:
        name, sign, value = word.partition("=")
        name = name.replace("-", "_").lower()
        if not sign or name not in ("slots", "max_slots"):
            raise LaunchError(f"{where}: unknown entry, got {word!r} in {entry!r}; write: {host.name} slots=4")
        if name == "slots":
            if ":" in first:
                raise LaunchError(f"{where}: has the slots twice, got {entry!r}; write: {host.name} slots=4")
            host = Host(host.name, _parse_slots(value, where))
        else:
            _parse_slots(value, where)
    return host


def _parse_item(item: str, where: str) -> Host:
    name, colon, slots = item.partition(":")
    if not _NAME.fullmatch(name) or len(name) > _LONGEST_NAME:
        raise LaunchError(
            f"{where}: is no host name or IPv4 address, got {name!r}; write such as node0:4 or 10.0.0.1:4"
        )
    return Host(name, _parse_slots(slots, where) if colon else 1)


def _parse_slots(text: str, where: str) -> int:
    if not (text.isascii() and text.isdigit() and 1 <= int(text[:9]) <= _MOST_SLOTS):
        raise LaunchError(f"{where}: slots must be a number from 1, got {text!r}; write such as node0:4")
    return int(text)


def _merge(hosts: Iterable[Host]) -> list[Host]:
    slots: dict[str, int] = {}
    for host in hosts:
        slots[host.name] = slots.get(host.name, 0) + host.slots
    return [Host(name, count) for name, count in slots.items()]
