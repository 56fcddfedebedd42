"""A step that one rank does not bring to its end: all raise, or average gradients of one step; never those of two."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

import mpitrain.torch as hvd  # noqa: E402
from mpitrain.collectives import Handle, PersistentPlan  # noqa: E402
from mpitrain.torch import handles  # noqa: E402
from mpitrain.torch.named_gradients import NamedGradients  # noqa: E402
from mpitrain.torch.reducer import GradientReducer  # noqa: E402
from mpitrain.torch.slots import Bucket  # noqa: E402
from mpitrain.torch.starting import Operation  # noqa: E402
from tests.support.ranks import outcome  # noqa: E402
from tests.support.training import initialized  # noqa: E402

pytestmark = pytest.mark.mpi(min_size=2)


@pytest.fixture(autouse=True)
def _initialized():
    # Each parameter has a bucket of its own.
    with initialized(bucket_nbytes="64"):
        yield


def is_odd():
    return hvd.rank() == hvd.size() - 1


class Training:
    """Gradients that tell rank and step."""

    def __init__(self, **options):
        self.params = [torch.nn.Parameter(torch.ones(40 + index)) for index in range(5)]
        self.optimizer = hvd.DistributedOptimizer(torch.optim.SGD(self.params, lr=0.0), **{"op": hvd.Sum, **options})

    def step(self, step):
        self.optimizer.zero_grad()
        torch.stack([(param * gradient(hvd.rank(), step)).sum() for param in self.params]).sum().backward()
        self.optimizer.step()
        return {value for param in self.params for value in param.grad.tolist()}


def gradient(rank, step):
    return 8.0**rank * (step + 1)


def total(step):
    return {sum(gradient(rank, step) for rank in range(hvd.size()))}


def interrupt(monkeypatch, owner, name, turn, place):
    """Have the n-th call of a method end with an interrupt, before or after it has done anything."""
    original = getattr(owner, name)
    calls = []

    def interrupted(*arguments, **options):
        calls.append(name)
        if len(calls) == turn and place == "before":
            raise KeyboardInterrupt
        result = original(*arguments, **options)
        if len(calls) == turn and place == "after":
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(owner, name, interrupted)


@pytest.mark.parametrize("place", ["before", "after"])
@pytest.mark.parametrize("turn", [1, 3, 5])
@pytest.mark.parametrize("where", ["take", "launch", "wait", "finish"])
def test_an_interrupted_step_is_never_mixed_with_the_next_one(where, turn, place, monkeypatch):
    owner, name = {
        "take": (Bucket, "take"),
        "launch": (PersistentPlan, "start"),
        "wait": (Handle, "wait"),
        "finish": (Bucket, "finish"),
    }[where]
    training = Training()
    for step in range(2):
        assert training.step(step) == total(step)
    if is_odd():
        interrupt(monkeypatch, owner, name, turn, place)
        with pytest.raises(KeyboardInterrupt):
            training.step(2)
        monkeypatch.undo()
    else:
        result = outcome(lambda: training.step(2))
        assert result == total(2) or isinstance(result, hvd.HorovodInternalError), result
    for step in (3, 4):
        # The rank that was interrupted drops the step, and trains on.
        error = outcome(lambda: training.step(step))  # noqa: B023
        assert isinstance(error, hvd.HorovodInternalError), error
        assert "KeyboardInterrupt" in str(error)
    # In the words of an elastic job: another attempt.
    hvd.shutdown()
    hvd.init()
    for step in range(5, 8):
        assert training.step(step) == total(step)


@pytest.mark.parametrize("name", ["_add", "_agree", "_build"])
def test_an_interrupt_while_new_parameters_are_taken_on(name, monkeypatch):
    training = Training()
    for step in range(2):
        assert training.step(step) == total(step)
    training.params.append(torch.nn.Parameter(torch.ones(3)))
    training.optimizer.add_param_group({"params": training.params[-1:]})
    if is_odd():
        interrupt(monkeypatch, GradientReducer, name, 1, "before")
        with pytest.raises(KeyboardInterrupt):
            training.step(2)
        monkeypatch.undo()
    else:
        # The others wait for it in operations that set something up.
        assert isinstance(outcome(lambda: training.step(2)), hvd.HorovodInternalError)
    hvd.shutdown()
    hvd.init()
    for step in range(3, 6):
        assert training.step(step) == total(step)


def test_an_error_in_the_backward_pass_of_a_rank_that_trains_on():
    training = Training()
    for step in range(2):
        assert training.step(step) == total(step)
    handle = training.params[2].register_hook(fail) if is_odd() else None
    if is_odd():
        with pytest.raises(ArithmeticError):
            training.step(2)
        handle.remove()
        # Some gradients are under way: neither may they be dropped, nor others be added to them.
        with pytest.raises(AssertionError, match="zero_grad"):
            training.step(3)
        with pytest.raises(AssertionError, match="more than backward_passes_per_step times"):
            sum((param * 1.0).sum() for param in training.params).backward()
        training.optimizer.synchronize()
    else:
        training.step(2)
    for step in (3, 4):
        assert training.step(step) == total(step)


def fail(_gradient):
    raise ArithmeticError("in the middle of the backward pass")


@pytest.mark.parametrize("place", ["before", "after"])
@pytest.mark.parametrize(("where", "turn"), [("start", 1), ("start", 3), ("finish", 1), ("wait", 2)])
def test_an_interrupt_among_gradients_that_travel_by_name(where, turn, place, monkeypatch):
    class Unchanged(hvd.Compression.none):
        """Not a cast that is known, so gradients travel by name."""

    training = Training(compression=Unchanged)
    known = set(handles._handles)
    for step in range(2):
        assert training.step(step) == total(step)
    if is_odd():
        owner, name = {"start": (Operation, "start"), "wait": (Handle, "wait")}.get(where, (NamedGradients, "finish"))
        interrupt(monkeypatch, owner, name, turn, place)
        with pytest.raises(KeyboardInterrupt):
            training.step(2)
        monkeypatch.undo()
    else:
        result = outcome(lambda: training.step(2))
        assert isinstance(result, hvd.HorovodInternalError) if where == "start" else result == total(2), result
    # Steps of the same number meet.
    results = [outcome(lambda: training.step(step)) for step in (3, 4)]  # noqa: B023
    assert results == [total(3), total(4)]
    # Of what was given up nobody knows the number.
    assert set(handles._handles) <= known


def test_adasum_of_a_rank_whose_step_is_interrupted(monkeypatch):
    training = Training(op=hvd.Adasum)
    training.step(0)
    if is_odd():
        interrupt(monkeypatch, torch.optim.SGD, "step", 1, "after")
        with pytest.raises(KeyboardInterrupt):
            training.step(1)
        monkeypatch.undo()
    else:
        with pytest.raises(hvd.HorovodInternalError, match="KeyboardInterrupt"):
            training.step(1)
    # Steps of the same number meet.
    assert hvd.allreduce(torch.ones(1), op=hvd.Sum).item() == hvd.size()
    training.step(2)
