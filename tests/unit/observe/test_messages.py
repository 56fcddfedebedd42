"""Messages of mpitrain from a level on."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from mpitrain.observe import show_messages


@pytest.fixture(autouse=True)
def _level_of_before() -> Iterator[None]:
    yield
    logging.getLogger("mpitrain").setLevel(logging.NOTSET)


def lone_logger(monkeypatch: pytest.MonkeyPatch) -> logging.Logger:
    """mpitrain's logger with no handlers, not even those of pytest, which come before each phase of a test."""
    found = logging.getLogger("mpitrain")
    monkeypatch.setattr(found, "handlers", [])
    monkeypatch.setattr(found, "propagate", False)
    return found


def test_messages_of_the_level_and_above_are_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    logger = lone_logger(monkeypatch)
    for _ in range(2):
        show_messages("info")
    logger.debug("one")
    logger.info("two")
    logger.error("three")
    assert capsys.readouterr().err == "two\nthree\n"


def test_without_a_level_all_stays_as_the_program_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    logger = lone_logger(monkeypatch)
    show_messages("")
    assert (logger.handlers, logger.level) == ([], logging.NOTSET)


def test_handlers_of_the_program_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    logger = lone_logger(monkeypatch)
    own = logging.NullHandler()
    logger.addHandler(own)
    show_messages("debug")
    assert (logger.handlers, logger.level) == ([own], logging.DEBUG)
