"""Where measured tables lie, and how one is found again: a file per fingerprint in the user's cache folder."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import platform
import tempfile
from pathlib import Path

from mpitrain.collectives.table import FORMAT_VERSION, Table
from mpitrain.comm import Transport
from mpitrain.config import Settings, cache_folder

__all__ = ["Machine", "load_table", "read_table", "store_table", "store_text", "table_path"]

_log = logging.getLogger("mpitrain")

_REMEDY = "run `mpirun -np ... mpitrain tune` again, or delete the file"
_IN_PROCESS = ("in-process ranks", "1")
# Processors of ARM have no name, but numbers of who made them and of which kind they are.
_CPU_FIELDS = ("model name", "CPU implementer", "CPU part")


@dataclasses.dataclass(frozen=True, slots=True)
class Machine:
    """What measured times depend on: this rank's processor, and the MPI library.

    Attributes:
        cpu: Model of the processor.
        num_cores: Of the node.
        mpi: Name of the MPI library.
        mpi_version: Its version.
    """

    cpu: str
    num_cores: int
    mpi: str
    mpi_version: str

    @classmethod
    def here(cls, transport: Transport) -> Machine:
        """Return the machine that this rank runs on."""
        return cls._with(*_IN_PROCESS) if transport.native is None else cls.of_mpi()

    @classmethod
    def of_mpi(cls) -> Machine:
        """Return the machine that this process runs on, with the MPI library that it has started."""
        from mpitrain.comm.mpi_library import library_name_and_version

        return cls._with(*library_name_and_version())

    @classmethod
    def _with(cls, mpi: str, version: str) -> Machine:
        return cls(_cpu_model(), os.cpu_count() or 1, mpi, version)

    def __str__(self) -> str:
        """All of it, for people."""
        return f"{self.cpu}, {self.num_cores} cores, {self.mpi} {self.mpi_version}"

    @property
    def fingerprint(self) -> str:
        """The machine and, after a dash, the versions, each as a few hexadecimal digits."""
        return f"{self.family}-{_digest(self.mpi_version, FORMAT_VERSION)}"

    def fingerprint_with(self, *parts: object) -> str:
        """Return a fingerprint of the machine and something more."""
        return _digest(self.cpu, self.num_cores, self.mpi, self.mpi_version, *parts)

    @property
    def family(self) -> str:
        """The part of the fingerprint that no new version changes."""
        return _digest(self.cpu, self.num_cores, self.mpi)


def table_path(machine: Machine, settings: Settings) -> Path:
    """Return where the machine's table lies, or would lie."""
    folder = Path(settings.tune_dir) if settings.tune_dir else cache_folder() / "tune"
    return folder / f"{machine.fingerprint}.json"


def load_table(transport: Transport, settings: Settings) -> Table | None:
    """Return the table of the machine that rank 0 runs on, None if there is none; the same on every rank.

    Every rank must call. A file that cannot be used is left out, with a warning on rank 0.
    """
    table = _find_table(transport, settings) if transport.rank == 0 else None
    found: Table | None = transport.gather_everywhere(table)[0]
    return found


def read_table(path: Path, machine: Machine) -> Table:
    """Read a file.

    Raises:
        OSError: It cannot be read.
        ValueError: It holds no table, or one of another machine.
    """
    try:
        table = Table.from_json(json.loads(path.read_text(encoding="utf-8")))
    except RecursionError:
        raise ValueError("json: nested too deeply") from None
    if table.fingerprint != machine.fingerprint:
        raise ValueError(
            f"fingerprint: of another machine or MPI version, got {table.fingerprint}; "
            f"this one is {machine.fingerprint}"
        )
    return table


def store_table(table: Table, path: Path) -> None:
    """Write a file; see `store_text`.

    Raises:
        OSError: It cannot be written.
    """
    store_text(json.dumps(table.to_json(), indent=1) + "\n", path)


def store_text(text: str, path: Path) -> None:
    """Write a file, and its folder, whole or not at all, so that no reader ever sees a part of it.

    Raises:
        OSError: It cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        # Only the owner may read a temporary file, which is too strict for results.
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            Path(name).unlink()
        raise


def _find_table(transport: Transport, settings: Settings) -> Table | None:
    # The other ranks wait for the result, so nothing may be raised.
    machine = Machine.here(transport)
    try:
        path = table_path(machine, settings)
    except RuntimeError as error:  # no home
        _log.warning("measured table: no place to look for it (%s); set MPITRAIN_TUNE_DIR", error)
        return None
    try:
        return read_table(path, machine)
    except FileNotFoundError:
        _warn_of_other_versions(path.parent, machine)
    except (OSError, ValueError) as error:
        _log.warning("measured table %s: ignored (%s); %s", path, error, _REMEDY)
    return None


def _warn_of_other_versions(folder: Path, machine: Machine) -> None:
    """Say so if a new version of the MPI library or of the format has made a table useless."""
    with contextlib.suppress(OSError):
        for stale in sorted(folder.glob(f"{machine.family}-*.json")):
            problem = f"not measured with {machine.mpi} {machine.mpi_version} in format {FORMAT_VERSION}"
            _log.warning("measured table %s: ignored (%s); %s", stale, problem, _REMEDY)
            return


def _cpu_model() -> str:
    names: dict[str, None] = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            field, _, value = line.partition(":")
            if field.strip() in _CPU_FIELDS:
                names[value.strip()] = None
    return ", ".join(names) or platform.processor() or platform.machine()


def _digest(*parts: object) -> str:
    return hashlib.blake2b(repr(parts).encode(), digest_size=6).hexdigest()
