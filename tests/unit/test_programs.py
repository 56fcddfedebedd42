"""Programs that are run for what they say."""

from __future__ import annotations

import sys

import pytest

from mpitrain.programs import Ended, run_program


def python(source, *, limit_s=60.0, environ=None):
    return run_program([sys.executable, "-c", source], limit_s=limit_s, environ=environ)


def test_what_a_program_says():
    done = python("import sys; print('out'); print('err', file=sys.stderr)")
    assert done == Ended(0, "out\n", "err\n")
    assert (done.ending, done.complaints, done.last_words) == ("status 0", ["err"], "err")


def test_it_has_nothing_to_read():
    assert python("import sys; print(repr(sys.stdin.read()))").output == "''\n"


def test_bytes_that_are_no_text_are_replaced():
    assert python("import sys; sys.stdout.buffer.write(b'a\\xffb')").output == "a\ufffdb"


def test_environment_is_its_own_if_given(monkeypatch):
    source = "import os; print(os.environ.get('MPITRAIN_WORD'))"
    monkeypatch.setenv("MPITRAIN_WORD", "ours")
    assert python(source).output == "ours\n"
    assert python(source, environ={"MPITRAIN_WORD": "theirs"}).output == "theirs\n"


@pytest.mark.parametrize(
    ("errors", "complaints", "last_words"),
    [
        ("", [], "status 3"),
        ("-----\n\n  no slots \n - - -\n", ["no slots"], "no slots"),
        ("Traceback\n  line\nValueError: wrong\n", ["Traceback", "line", "ValueError: wrong"], "ValueError: wrong"),
    ],
)
def test_last_words(errors, complaints, last_words):
    ended = Ended(3, "", errors)
    assert (ended.complaints, ended.last_words) == (complaints, last_words)


def test_end_by_a_signal_has_its_name():
    done = python("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    assert (done.status, done.ending, done.last_words) == (-9, "SIGKILL", "SIGKILL")
    assert Ended(-35, "", "").ending == "signal 35"


def test_it_does_not_run_for_ever():
    with pytest.raises(TimeoutError, match=r"python.*: did not end within 0\.5 s, and was killed"):
        python("import time; time.sleep(60)", limit_s=0.5)


def test_what_cannot_be_started():
    with pytest.raises(OSError, match="no-such-program"):
        run_program(["/no-such-program"], limit_s=1.0)
