"""Variables of Horovod that a script finds set when it calls `init`."""

from __future__ import annotations

import logging

import pytest

pytest.importorskip("torch")

import mpitrain.torch as hvd
from mpitrain.torch import world


def test_settings_come_from_variables_of_horovod_and_those_in_vain_are_named_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("HOROVOD_FUSION_THRESHOLD", "12345")
    monkeypatch.setenv("HOROVOD_CYCLE_TIME", "2")
    monkeypatch.setenv("HOROVOD_AUTOTUNE", "1")
    world._name_unused_variables.cache_clear()
    for _ in range(2):
        hvd.shutdown()
        with caplog.at_level(logging.WARNING, "mpitrain"):
            hvd.init()
    try:
        assert hvd.communicator().settings.fusion_nbytes == 12345
    finally:
        hvd.shutdown()
    named = [record.getMessage() for record in caplog.records]
    assert named == ["r0 | not used here: HOROVOD_AUTOTUNE, HOROVOD_CYCLE_TIME; docs/horovod.md says why"]
