"""Runs a program as `python` itself would, with `horovod` standing for this package."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path
from typing import NoReturn

from mpitrain.collectives import end_with_failure
from mpitrain.horovod.program import ProgramError, named_program

__all__ = ["install", "main"]

_USAGE = "mpirun -np N python -m mpitrain.horovod (SCRIPT | -m MODULE | -c CODE) [ARGUMENT ...]"
_FAILED = 1


def install() -> None:
    """Let `horovod` stand for this package from now on, in this process and in those multiprocessing makes of it.

    Raises:
        ImportError: Another `horovod` has been imported before.
    """
    folder = str(Path(__file__).with_name("path"))
    if folder not in sys.path:
        # Behind the folder of the program, and before all that is installed.
        sys.path.insert(0 if _is_path_safe() else 1, folder)
    found = importlib.import_module("horovod").__file__
    if found is None or Path(found).parents[1] != Path(folder):
        raise ImportError(f"horovod: another one comes before that of mpitrain, got {found}; run without it")


def main() -> None:
    """Run the program that the command line names, and end as it ends.

    An exception ends the whole job, as does an exit status that is not 0, whatever the other ranks wait for.
    """
    parser = argparse.ArgumentParser("python -m mpitrain.horovod", _USAGE, __doc__, add_help=False)
    if sys.argv[1:2] in (["-h"], ["--help"]):
        parser.print_help()
        return
    try:
        program = named_program(sys.argv[1:])
        sys.argv = program.arguments
        if not _is_path_safe():
            sys.path[0] = program.folder
        install()
        code, variables = program.load()
        if variables["__spec__"] is not None:
            sys.argv[0] = variables["__file__"]
        namespace = vars(sys.modules["__main__"])
        namespace.clear()
        namespace.update(variables, __name__="__main__", __builtins__=sys.modules["builtins"])
        exec(code, namespace)  # noqa: S102  (what this module is for)
    except ProgramError as error:
        parser.exit(error.status, f"{parser.format_usage()}{parser.prog}: {error}\n")
    except SystemExit as end:
        if end.code not in (None, 0):
            end_with_failure(end)
        raise
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # noqa: BLE001  (whatever ends a program)
        _fail(error)


def _fail(error: BaseException) -> NoReturn:
    """Report the error as Python does, without the frames of this package, and end."""
    traceback, own = error.__traceback__, Path(__file__).parent
    while traceback is not None and Path(traceback.tb_frame.f_code.co_filename).parent == own:
        traceback = traceback.tb_next
    sys.excepthook(type(error), error.with_traceback(traceback), traceback)
    sys.stderr.flush()
    end_with_failure(error)
    sys.exit(_FAILED)


def _is_path_safe() -> bool:
    """Whether `sys.path` begins with no folder of the program (Python 3.11 and later: `python -P`)."""
    return bool(getattr(sys.flags, "safe_path", False))
