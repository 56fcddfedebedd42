"""What rank 0 shows while a job runs: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import TracebackType
from typing import final

import rich.console
import rich.progress

__all__ = ["Progress"]


@final
class Progress:
    """Says how far a job is.

        with Progress(num_steps, is_shown=hvd.rank() == 0) as progress:
            progress.update(step, loss, samples_per_s, communication_share)
            progress.line("epoch 1 ...")

    Args:
        num_steps: In all.
        is_shown: Whether this rank shows anything.
    """

    def __init__(self, num_steps: int, *, is_shown: bool) -> None:
        self._console = rich.console.Console(quiet=not is_shown, soft_wrap=True, highlight=False)
        self._bar = rich.progress.Progress(
            rich.progress.BarColumn(bar_width=30),
            rich.progress.TextColumn("step {task.completed}/{task.total}"),
            rich.progress.TextColumn("{task.description}"),
            rich.progress.TimeRemainingColumn(compact=True),
            console=self._console,
            transient=True,
            disable=not (is_shown and is_watched()),
        )
        self._task = self._bar.add_task("", total=num_steps)

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.stop()

    def update(self, step: int, loss: float, samples_per_s: float, communication_share: float) -> None:
        """Move the bar; the numbers are those of this rank."""
        if not self._bar.disable:
            description = f"loss {loss:.4f}, {speed(samples_per_s, communication_share)}"
            self._bar.update(self._task, completed=step, description=description)

    def line(self, text: str) -> None:
        """Print a line, above the bar."""
        self._console.print(text, markup=False)
        # A launcher passes on what was flushed, and a job is watched.
        self._console.file.flush()


def speed(samples_per_s: float, communication_share: float) -> str:
    """Return both in words."""
    return f"{samples_per_s:.0f} samples/s, {communication_share:.1%} communication"


def is_watched() -> bool:
    """Whether output goes to a terminal that somebody looks at.

    Open MPI gives its ranks a terminal of its own, of no width, whether it runs in one or not; then its own
    output is what counts, where the system lets one look.
    """
    if not sys.stdout.isatty():
        return False
    if os.get_terminal_size(sys.stdout.fileno()).columns > 0:
        return True
    try:
        return str(Path(f"/proc/{os.getppid()}/fd/1").readlink()).startswith(("/dev/pts/", "/dev/tty"))
    except OSError:
        return False
