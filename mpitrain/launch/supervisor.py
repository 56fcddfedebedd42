"""Watches over a launcher: passes its output on, notes how ranks end, and ends all when one has failed."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import IO

from mpitrain.errors import LaunchError
from mpitrain.launch.agent import die_with_parent

__all__ = ["Failure", "Outcome", "run_job"]

_READ_NBYTES = 1 << 16
_ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# Most launchers stop the other ranks when one has failed, and those have something to say before; MPICH's leaves those
# on other hosts running.
_GRACE_S = 3.0
# How long a launcher that was asked to end may take, and one that was killed.
_ENDING_S = 10.0


@dataclasses.dataclass(frozen=True)
class Failure:
    """The first rank whose program failed.

    Attributes:
        rank: Its rank.
        status: Exit status of its program; 128 and the signal's number if one has ended it.
        host: Where it ran.
        time_s: When it ended, by that host's clock.
    """

    rank: str
    status: int
    host: str
    time_s: float


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a job ended.

    Attributes:
        status: Exit status for this process: that of the first rank that failed, or 128 and the number of a signal
            that this process got, or the launcher's.
        failure: Of the first rank that failed, if one did.
        lost: Ranks of which nothing was heard, though no rank has failed and nobody has ended the job: their hosts are
            lost, or the launcher has not started them.
    """

    status: int
    failure: Failure | None = None
    lost: tuple[int, ...] = ()


def run_job(command: Sequence[str], environ: Mapping[str, str], token: str, size: int) -> Outcome:
    """Run the launcher to its end.

    Its output becomes this process's. When a rank fails, or this process gets a signal to end, everything is ended:
    first by asking the launcher, then by killing it, upon which the agents of the ranks end theirs.

    Args:
        command: Launcher and arguments, as from `build_command`.
        environ: Its environment.
        token: Word that begins the report of an agent.
        size: Number of ranks.

    Raises:
        LaunchError: The launcher cannot be started.
    """
    with _caught_signals() as (wake, caught):
        try:
            process = subprocess.Popen(  # noqa: S603  (what `build_command` made, and no shell)
                command,
                env=environ,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                preexec_fn=die_with_parent(signal.SIGTERM),  # noqa: PLW1509  (this process has one thread)
            )
        except OSError as error:
            raise LaunchError(f"{command[0]}: cannot be started, {error.strerror}; see mpitrain doctor") from error
        with process:
            watch = _Watch(process, token, wake, caught)
            watch.run()
        status = process.returncode
    watch.end_line()
    if watch.failure is not None:
        return Outcome(watch.failure.status, watch.failure)
    if caught:
        return Outcome(128 + caught[0])
    lost = tuple(rank for rank in range(size) if str(rank) not in watch.ended)
    if status == 0:
        # Open MPI 5 ends with 0 after it has lost a host, more often than not.
        return Outcome(1 if lost else 0, lost=lost)
    return Outcome(status if status > 0 else 128 - status, lost=lost)


@contextlib.contextmanager
def _caught_signals() -> Iterator[tuple[int, list[int]]]:
    """Note signals that would end this process; yields a descriptor that becomes readable, and their numbers."""
    wake, alarm = os.pipe()
    os.set_blocking(wake, False)
    os.set_blocking(alarm, False)
    caught: list[int] = []
    before = {number: signal.signal(number, lambda got, _frame: caught.append(got)) for number in _ENDING_SIGNALS}
    previous_alarm = signal.set_wakeup_fd(alarm)
    try:
        yield wake, caught
    finally:
        signal.set_wakeup_fd(previous_alarm)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(wake)
        os.close(alarm)


class _Watch:
    """One run of a launcher.

    Attributes:
        failure: Of the first rank that failed.
        ended: Ranks whose programs have ended.
    """

    def __init__(self, process: subprocess.Popen[bytes], token: str, wake: int, caught: list[int]) -> None:
        self._process = process
        self._report = f"{token} ".encode()
        self._wake = wake
        self._caught = caught
        self.failure: Failure | None = None
        self.ended: set[str] = set()
        # What is done next if the launcher does not end, and when. Output that is still open then is left alone.
        self._steps = iter((process.terminate, process.kill, self._give_up))
        self._is_given_up = False
        self._is_line_open = False
        self._deadline_s: float | None = None

    def run(self) -> None:
        """Pass output on until there is no more."""
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        rests = {self._process.stdout.fileno(): b"", self._process.stderr.fileno(): b""}
        dests: dict[int, IO[bytes]] = dict(zip(rests, (sys.stdout.buffer, sys.stderr.buffer), strict=True))
        with selectors.DefaultSelector() as selector:
            for descriptor in (self._wake, *rests):
                selector.register(descriptor, selectors.EVENT_READ)
            while len(selector.get_map()) > 1 and not self._is_given_up:
                for key, _ in selector.select(self._remaining_s()):
                    if key.fd == self._wake:
                        os.read(self._wake, _READ_NBYTES)
                        continue
                    data = os.read(key.fd, _READ_NBYTES)
                    rests[key.fd] = self._pass_on(rests[key.fd] + data, dests[key.fd], at_end=not data)
                    if not data:
                        selector.unregister(key.fd)
                    elif key.fd == self._process.stderr.fileno():
                        self._is_line_open = not data.endswith(b"\n")
                self._go_on()

    def _pass_on(self, text: bytes, dest: IO[bytes], *, at_end: bool) -> bytes:
        """Write whole lines, take reports out; return the rest of a line that could become a report."""
        *lines, rest = text.split(b"\n")
        for line in lines:
            left = self._take_report(line)
            if left is not None:
                dest.write(left + b"\n")
        # Without tags a line may grow slowly, such as a row of dots; it is shown as it grows.
        if at_end or not self._report.startswith(rest[: len(self._report)]):
            dest.write(rest)
            rest = b""
        dest.flush()
        return rest

    def end_line(self) -> None:
        """End the line that the launcher has left half way, so that what is said next begins one."""
        if self._is_line_open:
            sys.stderr.buffer.write(b"\n")
            sys.stderr.buffer.flush()

    def _give_up(self) -> None:
        self._is_given_up = True

    def _take_report(self, line: bytes) -> bytes | None:
        """Note a report; return what is left of the line, None if that is nothing."""
        before, report, after = line.partition(self._report)
        if not report:
            return line
        rank, status, host, time_s = after.decode(errors="replace").split()
        self.ended.add(rank)
        if int(status):
            failure = Failure(rank, int(status), host, float(time_s))
            if self.failure is None:
                self._deadline_s = time.monotonic() + _GRACE_S
            # What ranks do that miss the first one may be heard of earlier.
            self.failure = min(self.failure or failure, failure, key=lambda each: each.time_s)
        return before or None

    def _remaining_s(self) -> float | None:
        return None if self._deadline_s is None else max(0.0, self._deadline_s - time.monotonic())

    def _go_on(self) -> None:
        """Take the next step of ending when it is time: at once after a signal, else after some grace."""
        is_due = self._deadline_s is not None and time.monotonic() >= self._deadline_s
        if is_due or (self._caught and self._deadline_s is None):
            next(self._steps)()
            self._deadline_s = time.monotonic() + _ENDING_S
