"""What MPI says about device memory, and what a trial finds; the stand-in's device memory lies on the host."""

from __future__ import annotations

import sys

import pytest

from mpitrain.comm import cuda_aware
from mpitrain.comm.cuda_aware import CudaAwareness, exchange_with_itself, try_exchange, what_mpi_says
from tests.support import fake_cupy as stand_in_folder


@pytest.fixture
def child(monkeypatch):
    """Let the trial's process find the stand-in."""
    for name, value in stand_in_folder.environment().items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    "name", ["OMPI_MCA_opal_cuda_support", "MPIR_CVAR_ENABLE_GPU", "MPICH_GPU_SUPPORT_ENABLED", "MV2_USE_CUDA"]
)
def test_variable_that_switches_it_off_is_believed(monkeypatch, name):
    monkeypatch.setenv(name, "0")
    assert what_mpi_says() == (False, f"{name}=0 in the environment")


@pytest.mark.parametrize("answer", [0, 1])
def test_query_of_the_library(monkeypatch, answer):
    monkeypatch.setattr(cuda_aware, "_find_function", lambda name: lambda: answer)
    assert what_mpi_says() == (bool(answer), "MPIX_Query_cuda_support says so")


def test_variable_counts_where_the_library_says_nothing(monkeypatch):
    monkeypatch.setattr(cuda_aware, "_find_function", lambda name: None)
    assert what_mpi_says() == (None, "it has no MPIX_Query_cuda_support")
    monkeypatch.setenv("MV2_USE_CUDA", "1")
    assert what_mpi_says() == (True, "MV2_USE_CUDA=1 in the environment")


def test_function_of_the_library_is_found():
    assert cuda_aware._find_function("MPI_Init") is not None
    assert cuda_aware._find_function("MPI_No_such_function") is None


def test_trial_of_memory_that_mpi_takes(child, monkeypatch):
    # As in a rank of a job, whose place the trial must not take.
    monkeypatch.setenv("PMIX_RANK", "1")
    monkeypatch.setenv("PMI_RANK", "1")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    assert try_exchange(0) == CudaAwareness(is_aware=True, source="a trial exchanged device memory")


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "a trial was ended by SIGSEGV"),
        ("raise ValueError('trial: wrong bytes')", "a trial failed: ValueError: trial: wrong bytes"),
        ("import time; time.sleep(60)", "a trial did not end within 1 s"),
    ],
)
def test_trial_that_fails_costs_nothing_but_the_answer(monkeypatch, body, words):
    monkeypatch.setattr(cuda_aware, "_TRIAL", body)
    limit_s = 1.0 if "sleep" in body else 60.0
    assert try_exchange(0, limit_s) == CudaAwareness(is_aware=False, source=words)


def test_trial_without_cupy_says_so(monkeypatch):
    monkeypatch.setattr(cuda_aware, "_TRIAL", f"import sys; sys.modules['cupy'] = None; {cuda_aware._TRIAL}")
    assert "device arrays need CuPy" in try_exchange(0).source


def test_bytes_that_come_wrong_are_seen(fake_cupy, monkeypatch):
    from mpi4py import MPI

    class Broken:
        @staticmethod
        def Sendrecv(*arguments):  # noqa: N802
            """Bring nothing."""

    monkeypatch.setattr(MPI, "COMM_SELF", Broken)
    with pytest.raises(ValueError, match="trial: 1 elements came wrong"):
        exchange_with_itself(0)
    assert sys.modules["cupy"] is fake_cupy
