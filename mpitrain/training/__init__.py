"""What a data-parallel job needs around its steps: data by rank, learning rate, checkpoints, measurements.

Everything takes its `Communicator`, or its rank and size, as an argument, and can be made anew when those
change.
"""

from mpitrain.training.checkpoint import load_checkpoint, save_checkpoint
from mpitrain.training.learning_rate import linear_scaling
from mpitrain.training.loop import TrainingLoop
from mpitrain.training.meter import Meter
from mpitrain.training.replicas import check_replicas
from mpitrain.training.sampler import ShardedSampler
from mpitrain.training.stopping import StopRequest

__all__ = [
    "Meter",
    "ShardedSampler",
    "StopRequest",
    "TrainingLoop",
    "check_replicas",
    "linear_scaling",
    "load_checkpoint",
    "save_checkpoint",
]
