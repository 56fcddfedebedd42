from __future__ import annotations

import pytest
import torch

from mpitrain.training import linear_scaling


def test_warmup_rises_in_equal_steps_from_one_to_the_factor() -> None:
    multiplier = linear_scaling(8, warmup_steps=7)
    assert [multiplier(step) for step in range(10)] == pytest.approx([1, 2, 3, 4, 5, 6, 7, 8, 8, 8])


def test_without_warmup_the_factor_holds_from_the_start() -> None:
    assert [linear_scaling(4)(step) for step in range(3)] == [4, 4, 4]


def test_a_smaller_batch_needs_no_warmup() -> None:
    assert [linear_scaling(0.5, warmup_steps=3)(step) for step in range(4)] == [0.5] * 4


def test_a_schedule_of_torch_takes_it() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, linear_scaling(3, warmup_steps=2))
    rates = []
    for _ in range(4):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.3])


@pytest.mark.parametrize("factor", [0, -1, float("nan")])
def test_a_factor_that_is_not_positive_is_refused(factor) -> None:
    with pytest.raises(ValueError, match="factor"):
        linear_scaling(factor)


def test_negative_warmup_is_refused() -> None:
    with pytest.raises(ValueError, match="warmup_steps"):
        linear_scaling(2, warmup_steps=-1)
