"""A Python program as a command line names it: where it comes from, and what it finds around it."""

from __future__ import annotations

import dataclasses
import functools
import importlib.machinery
import importlib.util
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from types import CodeType
from typing import Any

__all__ = ["Program", "ProgramError", "named_program"]

# What Python ends with where it cannot find a module, and where it cannot make sense of its command line.
_NOT_FOUND = 1
_MISUSED = 2


class ProgramError(Exception):
    """There is no such program.

    Attributes:
        status: What Python would end with.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


@dataclasses.dataclass(frozen=True)
class Program:
    """What is to be run.

    Attributes:
        arguments: Its `sys.argv`.
        folder: What its `sys.path` begins with.
        load: Returns its code, and the variables of `__main__` that say where it comes from. Raises `ProgramError`,
            and what importing packages or compiling raises. It is called with `sys.path` as the program has it.
    """

    arguments: list[str]
    folder: str
    load: Callable[[], tuple[CodeType, dict[str, Any]]]


def named_program(arguments: Sequence[str]) -> Program:
    """Return what the arguments that follow `python` name: a file, `-m` and a module, or `-c` and code.

    Raises:
        ProgramError: They name nothing.
    """
    if not arguments:
        raise ProgramError("no program is named", _MISUSED)
    first, *others = arguments
    if not first.startswith("-"):
        # As Python has it, links are followed for the folder and not for the file.
        return Program([first, *others], str(Path(first).resolve().parent), functools.partial(_load_script, first))
    if first not in ("-m", "-c"):
        raise ProgramError(f"unknown option {first}; options of Python itself go before its -m", _MISUSED)
    if not others:
        raise ProgramError(f"{first}: an argument is missing", _MISUSED)
    name, *others = others
    if first == "-m":
        return Program(["-m", *others], str(Path.cwd()), functools.partial(_load_module, name))
    return Program(["-c", *others], "", functools.partial(_load_command, name))


def _load_script(name: str) -> tuple[CodeType, dict[str, Any]]:
    path = str(Path(name).absolute())
    try:
        with io.open_code(path) as file:
            source = file.read()
    except OSError as error:
        raise ProgramError(f"can't open file {path!r}: {error}", _MISUSED) from error
    loader = importlib.machinery.SourceFileLoader("__main__", path)
    code = compile(source, path, "exec", dont_inherit=True)
    return code, {"__file__": path, "__cached__": None, **_origin(None, loader, None)}


def _load_module(name: str) -> tuple[CodeType, dict[str, Any]]:
    try:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.submodule_search_locations is not None:
            spec = importlib.util.find_spec(f"{name}.__main__")
    except ModuleNotFoundError as error:
        raise ProgramError(f"Error while finding module specification for {name!r} ({error})", _NOT_FOUND) from error
    loader = None if spec is None else spec.loader
    if spec is None or not isinstance(loader, importlib.abc.InspectLoader):
        raise ProgramError(f"No module named {name}, or none that can be executed", _NOT_FOUND)
    code = loader.get_code(spec.name)
    if code is None:
        raise ProgramError(f"No code object available for {name}", _NOT_FOUND)
    return code, {"__file__": spec.origin, "__cached__": spec.cached, **_origin(spec.parent, loader, spec)}


def _load_command(source: str) -> tuple[CodeType, dict[str, Any]]:
    return compile(source, "<string>", "exec", dont_inherit=True), _origin(
        None, importlib.machinery.BuiltinImporter, None
    )


def _origin(package: str | None, loader: Any, spec: importlib.machinery.ModuleSpec | None) -> dict[str, Any]:
    return {"__annotations__": {}, "__doc__": None, "__package__": package, "__loader__": loader, "__spec__": spec}
