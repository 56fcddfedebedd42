"""Which module of this package each module below `horovod` stands for."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NoReturn

from mpitrain.errors import UnavailableError

__all__ = ["MODULES", "STANDS_FOR", "Finder", "run"]

STANDS_FOR = "0.28.1"
"""The version of Horovod whose names and meaning these are."""

MODULES: dict[str, str | None] = {
    "horovod.common": None,
    "horovod.common.elastic": "mpitrain.torch.elastic",
    "horovod.common.exceptions": "mpitrain.horovod.exceptions",
    "horovod.common.process_sets": "mpitrain.torch.world",
    "horovod.common.util": "mpitrain.horovod.queries",
    "horovod.torch": "mpitrain.torch",
    "horovod.torch.compression": "mpitrain.torch.compression",
    "horovod.torch.elastic": "mpitrain.torch.elastic",
    "horovod.torch.elastic.sampler": "mpitrain.torch.elastic.sampler",
    "horovod.torch.elastic.state": "mpitrain.torch.elastic.state",
    "horovod.torch.functions": "mpitrain.torch",
    "horovod.torch.mpi_ops": "mpitrain.torch",
    "horovod.torch.optimizer": "mpitrain.torch",
    "horovod.torch.sync_batch_norm": "mpitrain.torch",
}
"""For each module its public names: those of the other module; None for a package that only holds others."""


class Finder(importlib.abc.MetaPathFinder):
    """Finds the modules of the table, and says of all others below `horovod` that they are not here."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Return where a module comes from; None if it is not below `horovod`.

        Raises:
            ModuleNotFoundError: It is below `horovod`, and nothing here stands for it.
        """
        del path, target
        if not fullname.startswith("horovod."):
            return None
        if fullname not in MODULES:
            raise ModuleNotFoundError(
                f"No module named {fullname!r}: mpitrain stands in for horovod.torch, and has {', '.join(MODULES)}; "
                "start jobs with mpirun",
                name=fullname,
            )
        is_package = any(name.startswith(f"{fullname}.") for name in MODULES)
        return importlib.machinery.ModuleSpec(fullname, _Loader(MODULES[fullname]), is_package=is_package)


class _Loader(importlib.abc.Loader):
    """Gives a new module the public names of another."""

    def __init__(self, source: str | None) -> None:
        self._source = source

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> None:
        """Leave making the module to Python."""

    def exec_module(self, module: ModuleType) -> None:
        if self._source is None:
            return
        source = importlib.import_module(self._source)
        module.__doc__ = f"{module.__name__}, as {self._source} has it."
        vars(module).update({name: getattr(source, name) for name in source.__all__}, __all__=list(source.__all__))


def run(*_arguments: Any, **_options: Any) -> NoReturn:
    """Refuse to start a function as a job: `horovod.run` of Horovod.

    Raises:
        UnavailableError: Always.
    """
    raise UnavailableError(
        "horovod.run: is not available; put the function into a script and start it with "
        "`mpirun -np 4 python -m mpitrain.horovod script.py`"
    )
