"""Programs that are run to their end for what they say: without a shell, nothing to read, and not for ever."""

from __future__ import annotations

import dataclasses
import signal
import subprocess
from collections.abc import Mapping, Sequence

__all__ = ["Ended", "run_program"]


@dataclasses.dataclass(frozen=True, slots=True)
class Ended:
    """A program that has ended.

    Attributes:
        status: 0 if all went well; what a signal has ended has the negative number of the signal.
        output: What it wrote to its standard output.
        errors: What it wrote to its standard error.
    """

    status: int
    output: str
    errors: str

    @property
    def ending(self) -> str:
        """How it ended: "status 3", or the name of a signal."""
        if self.status >= 0:
            return f"status {self.status}"
        # Those for programs' own use have no names.
        names = {each.value: each.name for each in signal.Signals}
        return names.get(-self.status, f"signal {-self.status}")

    @property
    def complaints(self) -> list[str]:
        """The lines of `errors`, but for empty ones and the rules that launchers draw around messages."""
        return [line.strip() for line in self.errors.splitlines() if line.strip(" -")]

    @property
    def last_words(self) -> str:
        """The last complaint, which tells the most of what Python and ssh write; without any, the `ending`."""
        return self.complaints[-1] if self.complaints else self.ending


def run_program(command: Sequence[str], *, limit_s: float, environ: Mapping[str, str] | None = None) -> Ended:
    """Run a program to its end.

    Args:
        command: Path of the program and its arguments. Nothing else is looked at: no shell, and no standard input.
        limit_s: After so many seconds it is killed.
        environ: Its environment; that of this process if not given.

    Raises:
        TimeoutError: It did not end within `limit_s`.
        OSError: It cannot be started.
    """
    try:
        done = subprocess.run(  # noqa: S603  (whoever calls answers for the command, and there is no shell)
            list(command),
            env=environ,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=limit_s,
            check=False,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired:
        raise TimeoutError(f"{command[0]}: did not end within {limit_s:g} s, and was killed") from None
    return Ended(done.returncode, done.stdout, done.stderr)
