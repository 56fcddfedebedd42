"""Where the answer is from whether MPI is CUDA-aware."""

from __future__ import annotations

import logging

import pytest

from mpitrain.collectives import awareness
from mpitrain.collectives.awareness import find_awareness
from mpitrain.collectives.table_file import Machine
from mpitrain.comm.cuda_aware import CudaAwareness
from mpitrain.config import Settings

MACHINE = Machine("a processor", 8, "Some MPI", "1.0")


@pytest.fixture
def tried(fake_cupy, monkeypatch, tmp_path):
    """Count trials, which all go well, and keep what is found in a folder of the test."""
    trials = []

    def try_exchange(device):
        trials.append(device)
        return CudaAwareness(is_aware=True, source="tried")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(awareness, "try_exchange", try_exchange)
    monkeypatch.setattr(awareness, "what_mpi_says", lambda: (None, "silence"))
    awareness._tried.cache_clear()
    yield trials
    awareness._tried.cache_clear()


@pytest.mark.parametrize("setting", ["yes", "no"])
def test_setting_goes_before_everything(tried, setting):
    found = find_awareness(MACHINE, Settings(cuda_aware=setting), 0)
    assert found == CudaAwareness(setting == "yes", f"MPITRAIN_CUDA_AWARE={setting}")
    assert not tried


def test_library_that_says_no_is_not_tried(tried, monkeypatch):
    monkeypatch.setattr(awareness, "what_mpi_says", lambda: (False, "it says no"))
    assert find_awareness(MACHINE, Settings(), 0) == CudaAwareness(is_aware=False, source="it says no")
    assert not tried


def test_trial_is_made_once_on_a_machine(tried, tmp_path, monkeypatch):
    first = find_awareness(MACHINE, Settings(), 0)
    assert first == CudaAwareness(is_aware=True, source="silence; tried")
    awareness._tried.cache_clear()  # another process
    (kept,) = (tmp_path / "mpitrain" / "cuda_aware").glob("*.json")
    assert find_awareness(MACHINE, Settings(), 0) == CudaAwareness(True, f"silence; tried (kept in {kept})")
    assert tried == [0]
    find_awareness(Machine("a processor", 8, "Some MPI", "2.0"), Settings(), 0)
    assert tried == [0, 0]
    kept.write_text("{")
    awareness._tried.cache_clear()
    assert find_awareness(MACHINE, Settings(), 0) == first


def test_folder_that_cannot_be_written_costs_a_trial_for_each_process(tried, tmp_path, caplog):
    (tmp_path / "mpitrain").write_text("not a folder")
    with caplog.at_level(logging.WARNING, "mpitrain"):
        assert find_awareness(MACHINE, Settings(), 0).is_aware
    assert "not kept" in caplog.text
    assert "MPITRAIN_CUDA_AWARE=yes or no" in caplog.text
