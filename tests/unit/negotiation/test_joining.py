"""What ranks that have joined bring, and steps that are negotiated only while there are some."""

from __future__ import annotations

import numpy as np
import pytest

from mpitrain.memory import DTYPES, ReduceOp, dtype_named, fill_neutral, reduce_into
from mpitrain.negotiation.announcement import Announcement, Tensor
from mpitrain.negotiation.joining import Steps, neutral_announcement, neutral_arrays


def storage_of(values: list[float], name: str) -> np.ndarray:
    if name == "bfloat16":
        return (np.array(values, np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return np.array(values).astype(name)


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("op", [op for op in ReduceOp if op is not ReduceOp.ADASUM])
def test_what_is_neutral_changes_nothing(op: ReduceOp, name: str) -> None:
    dtype = dtype_named(name)
    values = storage_of([0, 1, 3, 100] if dtype.kind in ("bool", "uint") else [0, -1, 3.5, -100], name)
    neutral = np.empty_like(values)
    try:
        fill_neutral(neutral, op, dtype)
    except TypeError:
        assert (name, op) == ("bool", ReduceOp.AVERAGE) or (
            dtype.kind == "complex" and op in (ReduceOp.MIN, ReduceOp.MAX)
        )
        return
    result = values.copy()
    reduce_into(result, neutral, op, dtype)
    assert result.tobytes() == values.tobytes()
    reduce_into(neutral, values, op, dtype)
    assert neutral.tobytes() == values.tobytes()


def test_a_rank_that_has_joined_brings_no_rows_and_scales_nothing() -> None:
    tensors = (Tensor("int8", (5, 2)), Tensor("bfloat16", (3,)))
    gathered = neutral_announcement(Announcement("a", "allgather", tensors))
    assert [array.shape for array in neutral_arrays(gathered)] == [(0, 2), (0,)]
    sent = neutral_announcement(Announcement("a", "alltoall", tensors[:1], splits=(5, 0)))
    assert (sent.splits, sent.tensors[0].shape) == ((0, 0), (0, 2))
    reduced = neutral_announcement(Announcement("a", "allreduce", tensors, "min", prescale=0.5, postscale=3.0))
    assert (reduced.prescale, reduced.postscale) == (1.0, 3.0)
    first, second = neutral_arrays(reduced)
    assert first.data.tolist() == [127] * 10
    assert (second.dtype.name, second.data.tolist()) == ("bfloat16", [0x7F80] * 3)


class Maker:
    def __init__(self) -> None:
        self.calls = 0

    def stand_in(self) -> None:
        self.calls += 1


def test_steps_are_announced_only_while_ranks_have_joined() -> None:
    announced: list[str] = []
    taken_back: list[str] = []
    steps = Steps(announced.append, taken_back.append)
    makers = [Maker(), Maker()]
    numbers = [steps.register(maker.stand_in) for maker in makers]
    assert numbers == [0, 1]
    with steps.entered(0):
        pass
    assert announced == []
    with steps.entered(1):
        steps.note_absent((2,))
        # Learned in the middle of it, and once.
        assert announced == ["step.1.1"]
        steps.note_absent((2, 3))
        assert announced == ["step.1.1"]
    # The negotiator knows whether it is decided.
    assert taken_back == ["step.1.1"]
    with steps.entered(0):
        assert announced == ["step.1.1", "step.0.2"]
    steps.note_absent(())
    with steps.entered(0):
        pass
    assert announced == ["step.1.1", "step.0.2"]
    assert taken_back == announced


def test_standing_in_counts_as_a_step() -> None:
    announced: list[str] = []
    taken_back: list[str] = []
    steps = Steps(announced.append, taken_back.append)
    maker = Maker()
    number = steps.register(maker.stand_in)
    steps.stand_in_of(f"step.{number}.7")()
    assert maker.calls == 1
    steps.note_absent((0,))
    with steps.entered(number):
        assert announced == [f"step.{number}.8"]
    del maker
    with pytest.raises(RuntimeError, match="what makes these steps is gone on this rank; keep the optimizer"):
        steps.stand_in_of(f"step.{number}.9")
