"""Elastic training with Horovod's names: work that is taken up again from the last commit.

state = hvd.elastic.TorchState(model, optimizer, epoch=0, batch=0)

@hvd.elastic.run
def train(state):
    for state.epoch in range(state.epoch, num_epochs):
        ...
        state.commit()

train(state)
"""

from mpitrain.errors import CollectiveError as HorovodInternalError
from mpitrain.errors import HostsUpdatedInterrupt
from mpitrain.torch.elastic.rerun import run
from mpitrain.torch.elastic.sampler import ElasticSampler
from mpitrain.torch.elastic.state import ObjectState, State, TorchState

__all__ = [
    "ElasticSampler",
    "HorovodInternalError",
    "HostsUpdatedInterrupt",
    "ObjectState",
    "State",
    "TorchState",
    "run",
]
