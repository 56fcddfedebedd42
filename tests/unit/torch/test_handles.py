"""Numbers of operations: whoever can ask no more for a result does not keep it for ever."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

import mpitrain.torch as hvd  # noqa: E402
from mpitrain.collectives import Handle  # noqa: E402
from mpitrain.memory import ReduceOp  # noqa: E402
from mpitrain.torch.arguments import Reduction  # noqa: E402
from mpitrain.torch.handles import _handles  # noqa: E402
from mpitrain.torch.named_gradients import NamedGradients  # noqa: E402
from mpitrain.torch.slots import Slot  # noqa: E402


@pytest.fixture(autouse=True)
def _initialized():
    hvd.init()
    known = set(_handles)
    yield
    assert set(_handles) == known
    hvd.shutdown()


def slots():
    """Of gradients of both kinds."""
    for position, grad in enumerate((torch.ones(3), torch.eye(3).to_sparse(1))):
        slot = Slot(position, f"gradient {position}", torch.nn.Parameter(torch.zeros(grad.shape)))
        slot.sparse_dim = grad.sparse_dim() if grad.is_sparse else 0
        slot.param.grad = grad
        yield slot


def test_a_step_that_is_given_up_leaves_none():
    gradients = NamedGradients(Reduction(ReduceOp.SUM, hvd.global_process_set))
    taken = list(slots())
    for _ in range(3):
        for slot in taken:
            slot.param.grad = torch.ones(slot.param.shape)
            gradients.start(slot)
        gradients.abandon(taken, RuntimeError("no more"))
        assert all(slot.param.grad is None for slot in taken)
    # It is a step like any other that comes then.
    for slot in taken:
        slot.param.grad = torch.ones(slot.param.shape)
        gradients.start(slot)
    gradients.finish()
    assert [slot.param.grad.to_dense().sum().item() for slot in taken] == [3.0, 9.0]


@pytest.mark.parametrize(
    "call",
    [
        lambda tensor: hvd.allreduce(tensor, name="x"),
        lambda tensor: hvd.grouped_allgather([tensor], name="x"),
        lambda tensor: hvd.broadcast_(tensor, 0),
        lambda tensor: hvd.barrier(),
        lambda tensor: hvd.broadcast_object("object"),
    ],
)
def test_a_call_that_is_interrupted_while_it_waits_leaves_none(call, monkeypatch):
    def interrupted(*_arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Handle, "wait", interrupted)
        patched.setattr(Handle, "done", False)
        with pytest.raises(KeyboardInterrupt):
            call(torch.ones(3))
