from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from mpitrain.training import ShardedSampler, TrainingLoop, linear_scaling

COUNT = 22
INPUTS = torch.randn(COUNT, 3, generator=torch.Generator().manual_seed(5))
TARGETS = INPUTS.sum(dim=1, keepdim=True)


def make_loop(**options: Any) -> TrainingLoop:
    torch.manual_seed(1)
    model = torch.nn.Linear(3, 1)

    def batch_loss(indices: Sequence[int]) -> torch.Tensor:
        return torch.nn.functional.mse_loss(model(INPUTS[indices]), TARGETS[indices])

    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    return TrainingLoop(
        model,
        optimizer,
        torch.optim.lr_scheduler.LambdaLR(optimizer, linear_scaling(3, warmup_steps=9)),
        ShardedSampler(COUNT, 0, 1, seed=4, drop_last=True),
        **{"batch_size": 4, "batch_loss": batch_loss, **options},
    )


def test_steps_go_on_over_epochs_without_the_incomplete_batch() -> None:
    loop = make_loop()
    assert loop.steps_per_epoch == 5
    places = [(step, loop.sampler.epoch, loop.sampler.done) for step in loop.run(12)]
    expected = [(step + 1, step // 5, (step % 5 + 1) * 4) for step in range(12)]
    assert places == expected
    assert loop.step == len(loop.losses) == 12
    assert sum(loop.losses[-3:]) < sum(loop.losses[:3]) / 2
    assert loop.meter.samples == 48


@pytest.mark.parametrize("stop", [1, 4, 5, 7, 10])
def test_a_loop_that_takes_over_a_state_goes_on_as_the_first_would(stop) -> None:
    whole = make_loop()
    list(whole.run(13))
    first, second = make_loop(), make_loop()
    for step in first.run(13):
        if step == stop:
            break
    second.load_state_dict(first.state_dict())
    assert [*second.run(13)] == list(range(stop + 1, 14))
    assert first.losses + second.losses == whole.losses
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, second.model.state_dict()[name])


def test_a_loop_that_is_done_takes_no_step() -> None:
    loop = make_loop()
    list(loop.run(3))
    assert list(loop.run(3)) == []
    assert len(loop.losses) == 3


@pytest.mark.parametrize("batch_size", [0, -4, 23])
def test_a_batch_size_that_does_not_fit_is_refused(batch_size) -> None:
    with pytest.raises(ValueError, match="batch size"):
        make_loop(batch_size=batch_size)


def test_a_batch_that_does_not_divide_among_the_ranks_is_refused_with_one_that_does() -> None:
    loop = make_loop()
    with pytest.raises(ValueError, match="multiple of the number of ranks, got 4 and 3 ranks; use 3"):
        TrainingLoop(
            loop.model,
            loop.optimizer,
            loop.schedule,
            ShardedSampler(COUNT, 1, 3),
            batch_size=4,
            batch_loss=lambda _: torch.zeros(()),
        )
