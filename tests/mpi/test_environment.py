"""The job is the one that was asked for; if this fails, nothing else in the folder means anything."""

from __future__ import annotations

import os

from mpi4py import MPI

VENDORS = {"openmpi": "Open MPI", "mpich": "MPICH"}


def test_size_is_what_mpirun_was_told() -> None:
    assert MPI.COMM_WORLD.Get_size() == int(os.environ.get("MPITRAIN_TEST_SIZE", MPI.COMM_WORLD.Get_size()))


def test_vendor_is_what_the_environment_has() -> None:
    name, _ = MPI.get_vendor()
    assert name == VENDORS.get(os.environ.get("MPITRAIN_TEST_MPI", ""), name)


def test_threads_may_call_mpi_at_the_same_time() -> None:
    assert MPI.Query_thread() == MPI.THREAD_MULTIPLE


def test_every_rank_takes_part() -> None:
    size = MPI.COMM_WORLD.Get_size()
    assert MPI.COMM_WORLD.allgather(MPI.COMM_WORLD.Get_rank()) == list(range(size))
