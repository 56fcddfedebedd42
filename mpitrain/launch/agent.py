"""Runs the program of one rank; started by the launcher on every host, by itself, without the rest of the package.

    python agent.py [--tag] [--token WORD] -- PROGRAM [ARGUMENT...]

With `--tag` each line of output begins with the rank. With `--token` the end of the program is reported in a line
"WORD RANK STATUS HOST TIME" on standard error. Signals go on to the program, and the program ends with the agent. Of an
argument of backslashes and a colon one backslash is taken away: a lone colon would end the program for launchers.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

__all__ = ["die_with_parent", "main"]

# The names of Open MPI, of PMIx, of MPICH and Intel MPI, and of Slurm.
_RANK_VARIABLES = ("OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK", "SLURM_PROCID")
_PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_COLON = re.compile(r"\\+:")
# Progress bars end their lines with a carriage return.
_END_OF_LINE = re.compile(rb"\r\n|\n|\r")
_READ_NBYTES = 1 << 16
_LONGEST_LINE = 1 << 13
# How long output is awaited from processes that the program has left behind.
_PATIENCE_S = 1.0
_NOT_FOUND, _NOT_RUN = 127, 126
_SET_PARENT_DEATH_SIGNAL = 1


def die_with_parent(number: int) -> Callable[[], None]:
    """Return a function for a new process to call, after which it gets a signal when its parent ends; Linux only."""
    if not sys.platform.startswith("linux"):
        return lambda: None
    # Loaded before the process is made, as little is safe in it.
    prctl = ctypes.CDLL(None).prctl

    def ask() -> None:
        prctl(_SET_PARENT_DEATH_SIGNAL, number)

    return ask


def _rank() -> str:
    return next((os.environ[name] for name in _RANK_VARIABLES if name in os.environ), "?")


class _Tagger:
    """Copies what is written into a pipe to a descriptor, whole lines at a time, each with the rank before it."""

    def __init__(self, dest: int, tag: bytes) -> None:
        self.source, self.entry = os.pipe()
        self._dest = dest
        self._tag = tag
        self._rest = b""

    def copy(self) -> bool:
        """Copy what has come; False at the end."""
        data = os.read(self.source, _READ_NBYTES)
        self._rest += data
        begin = 0
        for end in _END_OF_LINE.finditer(self._rest):
            self._write(self._rest[begin : end.end()])
            begin = end.end()
        self._rest = self._rest[begin:]
        if self._rest and (not data or len(self._rest) > _LONGEST_LINE):
            self._write(self._rest + b"\n")
            self._rest = b""
        return bool(data)

    def _write(self, line: bytes) -> None:
        # One call for each line, so that the lines of ranks do not mix.
        view = memoryview(self._tag + line)
        while view:
            view = view[os.write(self._dest, view) :]


def _start(program: Sequence[str], outputs: Sequence[int]) -> subprocess.Popen[bytes]:
    # MPICH talks to its ranks over a descriptor that they inherit.
    return subprocess.Popen(  # noqa: S603  (it is what the user has asked for, and no shell)
        program,
        stdout=outputs[0],
        stderr=outputs[1],
        close_fds=False,
        preexec_fn=die_with_parent(signal.SIGKILL),  # noqa: PLW1509  (the agent has one thread)
    )


def _run(program: Sequence[str], taggers: Sequence[_Tagger], received: list[int]) -> int:
    """Run the program to its end; return its exit status as a shell has it."""
    wake, alarm = os.pipe()
    for descriptor in (wake, alarm):
        os.set_blocking(descriptor, False)
    signal.set_wakeup_fd(alarm)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    child = _start(program, [tagger.entry for tagger in taggers] or [1, 2])

    def pass_on(number: int, _frame: object) -> None:
        # One that comes later, as others have learned of the end sooner than this agent, has not ended the program.
        if child.poll() is None:
            received.append(number)
            child.send_signal(number)

    for number in _PASSED_ON:
        signal.signal(number, pass_on)
    with selectors.DefaultSelector() as selector:
        selector.register(wake, selectors.EVENT_READ)
        for tagger in taggers:
            os.close(tagger.entry)
            selector.register(tagger.source, selectors.EVENT_READ, tagger)
        while len(selector.get_map()) > 1 or child.poll() is None:
            ready = selector.select(None if child.poll() is None else _PATIENCE_S)
            if not ready:
                break
            for key, _ in ready:
                if key.data is None:
                    with contextlib.suppress(BlockingIOError):
                        os.read(wake, _READ_NBYTES)
                elif not key.data.copy():
                    selector.unregister(key.fd)
    status = child.wait()
    return status if status >= 0 else 128 - status


def main(arguments: Sequence[str]) -> int:
    """Run what the arguments say; return the exit status for the launcher."""
    options, program = list(arguments[: arguments.index("--")]), list(arguments[arguments.index("--") + 1 :])
    program = [word[1:] if _COLON.fullmatch(word) else word for word in program]
    token = options[options.index("--token") + 1] if "--token" in options else ""
    rank = _rank()
    tag = f"[{rank}] ".encode()
    taggers = [_Tagger(1, tag), _Tagger(2, tag)] if "--tag" in options else []
    received: list[int] = []
    # The launcher's daemon on this host is the parent; without it nobody would end the rank.
    die_with_parent(signal.SIGTERM)()
    try:
        status = _run(program, taggers, received)
    except OSError as error:
        status = _NOT_FOUND if isinstance(error, FileNotFoundError) else _NOT_RUN
        reason = f"{tag.decode()}mpitrain: cannot run {program[0]!r} on {socket.gethostname()}: {error.strerror}\n"
        os.write(2, reason.encode(errors="surrogateescape"))
    # A rank that the launcher has stopped is no news.
    if token and signal.SIGTERM not in received:
        os.write(2, f"{token} {rank} {status} {socket.gethostname()} {time.time()}\n".encode())
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
