from __future__ import annotations

from typing import Any

import pytest
import torch

from mpitrain.collectives import Communicator
from mpitrain.errors import MpitrainError
from mpitrain.training import check_replicas
from tests.support.ranks import outcome, run_communicators


def state() -> dict[str, Any]:
    return {
        "weight": torch.arange(6.0).reshape(2, 3),
        "half": torch.zeros(4, dtype=torch.bfloat16),
        "steps": 3,
    }


def test_equal_tensors_have_one_digest() -> None:
    digests = run_communicators(3, lambda comm: check_replicas(state(), comm))
    assert len(set(digests)) == 1
    assert len(digests[0]) == 64


def minus_zero(tensors: dict[str, Any]) -> None:
    tensors["half"][1] = -0.0


def transposed(tensors: dict[str, Any]) -> None:
    tensors["weight"] = tensors["weight"].reshape(3, 2)


def renamed(tensors: dict[str, Any]) -> None:
    tensors["height"] = tensors.pop("weight")


@pytest.mark.parametrize(("change", "name"), [(minus_zero, "half"), (transposed, "weight"), (renamed, "height")])
def test_any_difference_is_an_error_on_every_rank(change, name) -> None:
    def body(comm: Communicator) -> object:
        mine = state()
        if comm.rank == 2:
            change(mine)
        return outcome(lambda: check_replicas(mine, comm))

    errors = run_communicators(4, body)
    for error in errors:
        assert isinstance(error, MpitrainError)
        assert "ranks [2] differ from rank 0" in str(error)
        assert name in str(error)


def test_the_digest_depends_on_the_contents() -> None:
    other = {**state(), "weight": torch.ones(2, 3)}
    digests = run_communicators(1, lambda comm: (check_replicas(state(), comm), check_replicas(other, comm)))
    assert digests[0][0] != digests[0][1]
