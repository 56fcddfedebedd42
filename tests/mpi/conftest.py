"""Runs one test on all ranks as one test: it passes when it passed on every rank.

After each phase of a test (setup, call, teardown) the ranks tell one another how it went. Where one
failed, all fail: rank 0 reports for the job, no rank goes on to the next test and into collectives that
others never enter, and `-x` stops all of them. A rank whose test failed and whose peers do not come,
because they wait for it in a collective, says so after a moment and then ends the job.

Without `--with-mpi` nothing here is collected, so that plain `pytest` neither starts MPI nor needs it.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

# A rank that waits for its peers starts its time limit anew after the first of these, so that the stack
# which is printed is that of a rank that hangs; after the second it gives up if its own test has failed.
GRACE_S = 2.0
PATIENCE_S = 60.0
# After the last test there is no time limit but this one.
END_S = 240.0

FAILURES = (Exception, pytest.fail.Exception)


class Ranks:
    """Tells all ranks how a phase of a test went on each of them."""

    def __init__(self, config: pytest.Config) -> None:
        from mpi4py import MPI

        self.config = config
        self.mpi = MPI
        # Its own communicator: nothing that a test leaves behind can be taken for what is said here.
        self.comm = MPI.COMM_WORLD.Dup()
        self.rank, self.size = self.comm.Get_rank(), self.comm.Get_size()

    def share(self, phase: str, outcome: str, failure: str = "", item: pytest.Item | None = None) -> list[Any]:
        """Return `(phase, outcome, failure)` of every rank; ends the job if the phases are not the same."""
        if self.size == 1:
            return [(phase, outcome, failure)]
        self._wait_for_all(phase, failure, item)
        said = self.comm.allgather((phase, outcome, failure))
        if len({where for where, _, _ in said}) > 1:
            places = "\n".join(f"rank {rank}: {where}" for rank, (where, _, _) in enumerate(said))
            self._end_job(f"ranks are at different tests; collection must not depend on the rank\n{places}")
        return said

    def _wait_for_all(self, phase: str, failure: str, item: pytest.Item | None) -> None:
        # Asking and sleeping, as a rank that spins here takes the core of one that is still at work.
        request = self.comm.Ibarrier()
        begin = time.monotonic()
        pause_s = 0.0
        is_late = False
        while not request.Test():
            waited_s = time.monotonic() - begin
            if waited_s > GRACE_S and not is_late:
                is_late = True
                if item is not None:
                    _restart_limit(item)
                if failure:
                    self._say(f"{phase} failed here, and has not ended on other ranks\n{failure}")
            if failure and waited_s > PATIENCE_S:
                self._end_job(f"{phase} failed here, and other ranks do not come out of it")
            if item is None and waited_s > END_S:
                self._end_job("all tests have ended here, and other ranks do not come to the end")
            time.sleep(pause_s)
            pause_s = min(pause_s + 1e-5, 1e-3)

    def _say(self, message: str) -> None:
        capture: Any = self.config.pluginmanager.getplugin("capturemanager")
        capture.suspend_global_capture(in_=True)
        print(f"\nrank {self.rank}/{self.size} | {message}", file=sys.stderr, flush=True)
        capture.resume_global_capture()

    def _end_job(self, message: str) -> None:
        self._say(message)
        self.mpi.COMM_WORLD.Abort(1)
        # MPICH's abort has been seen to return.
        os._exit(1)


RANKS = pytest.StashKey[Ranks]()
LIMIT = pytest.StashKey[Any]()


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    return None if config.getoption("--with-mpi") else True


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    if not config.getoption("--with-mpi"):
        return
    config.stash[RANKS] = Ranks(config)
    for plugin in config.pluginmanager.get_plugins():
        # pytest-mpi ends each report with a page of build flags; the header below has what matters.
        if type(plugin).__name__ == "MPIPlugin":
            plugin._is_testing_mpi = False


def pytest_report_header(config: pytest.Config) -> str:
    if RANKS not in config.stash:
        return "tests/mpi: left out; scripts/test-mpi runs them"
    ranks = config.stash[RANKS]
    vendor, version = ranks.mpi.get_vendor()
    return f"MPI: {vendor} {'.'.join(map(str, version))}, rank {ranks.rank} of {ranks.size}, pid {os.getpid()}"


def pytest_itemcollected(item: pytest.Item) -> None:
    item.add_marker(pytest.mark.mpi)


@pytest.hookimpl(tryfirst=True)
def pytest_timeout_set_timer(item: pytest.Item, settings: Any) -> None:
    item.stash[LIMIT] = settings


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None, Any, Any]:
    return (yield from _together(item, "setup"))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    return (yield from _together(item, "call"))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None, Any, Any]:
    return (yield from _together(item, "teardown"))


def _together(item: pytest.Item, phase: str) -> Generator[None, Any, Any]:
    ranks = item.config.stash[RANKS]
    where = f"{phase} of {item.nodeid}"
    _restart_limit(item)
    result: Any = None
    error: BaseException | None = None
    outcome, failure = "passed", ""
    try:
        result = yield
    except pytest.skip.Exception as skip:
        error, outcome = skip, "skipped"
    except FAILURES as raised:
        error, outcome = raised, "failed"
        failure = str(item.repr_failure(pytest.ExceptionInfo.from_exception(raised)))
    said = ranks.share(where, outcome, failure, item)
    if outcome != "failed":
        failures = {rank: text for rank, (_, other, text) in enumerate(said) if other == "failed"}
        if failures:
            first = min(failures)
            pytest.fail(f"failed on ranks {sorted(failures)}; on rank {first}:\n{failures[first]}", pytrace=False)
        # Skipped in setup on some ranks only, the others would be alone in the collectives of the test.
        if phase == "setup" and len({other for _, other, _ in said}) > 1:
            pytest.fail("skipped on some ranks only; a skip must not depend on the rank", pytrace=False)
    if error is not None:
        raise error
    return result


def _restart_limit(item: pytest.Item) -> None:
    # Each phase has a limit of its own: pytest-timeout stops the timer when a test fails, and the teardown
    # can hang all the same.
    if LIMIT in item.stash:
        item.ihook.pytest_timeout_cancel_timer(item=item)
        item.ihook.pytest_timeout_set_timer(item=item, settings=item.stash[LIMIT])


def pytest_unconfigure(config: pytest.Config) -> None:
    # mpirun ends the job when the first rank leaves with a failure; by then rank 0 has to have reported.
    if RANKS in config.stash:
        config.stash[RANKS].share("the end", "passed")
