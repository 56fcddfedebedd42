"""Collectives on real buffers: schedules compiled to programs, plans, the executor, the communicator."""

from mpitrain.collectives.communicator import Communicator
from mpitrain.collectives.departure import end_with_failure
from mpitrain.collectives.executor import Task
from mpitrain.collectives.objects import try_pickle
from mpitrain.collectives.persistent import PersistentPlan
from mpitrain.collectives.progress import Handle, ProgressEngine

__all__ = ["Communicator", "Handle", "PersistentPlan", "ProgressEngine", "Task", "end_with_failure", "try_pickle"]
