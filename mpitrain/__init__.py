"""Collective communication and data-parallel training over MPI.

    from mpitrain import Communicator

    comm = Communicator.from_mpi()
    total = comm.allreduce(array)

`mpitrain.torch` is the face for PyTorch, with Horovod's names. Importing either starts nothing: MPI is
initialised when the first communicator is made.
"""

from mpitrain.collectives import Communicator, Handle, PersistentPlan
from mpitrain.config import Settings
from mpitrain.memory import ReduceOp

__all__ = ["Communicator", "Handle", "PersistentPlan", "ReduceOp", "Settings"]

__version__ = "0.1.0"
