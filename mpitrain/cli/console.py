"""Where commands write: a terminal, or a file that nobody watches."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import rich.console

__all__ = ["is_terminal", "make_console"]

# Columns of a table that goes to a file, where no window says how wide it may be.
_FILE_WIDTH = 132


def is_terminal() -> bool:
    """Whether somebody watches: Open MPI gives its ranks a terminal even if its own output goes to a file."""
    if not sys.stdout.isatty():
        return False
    launcher_output = Path(f"/proc/{os.getppid()}/fd/1")
    try:
        target = launcher_output.readlink()
    except OSError:  # not Linux, or another user's
        return True
    return str(target).startswith(("/dev/pts/", "/dev/tty", "/dev/console"))


def make_console() -> rich.console.Console:
    """Return where rank 0 writes."""
    if is_terminal():
        return rich.console.Console()
    return rich.console.Console(force_terminal=False, no_color=True, width=_FILE_WIDTH)
