"""Whether all ranks still have the same model."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch

from mpitrain.collectives import Communicator
from mpitrain.errors import MpitrainError

__all__ = ["check_replicas"]


def check_replicas(state: Mapping[str, Any], comm: Communicator) -> str:
    """Compare the tensors of all ranks to the last bit. Every rank must call.

    Args:
        state: Such as `model.state_dict()`.
        comm: Whose ranks are compared.

    Returns:
        SHA-256 of names, dtypes, shapes and contents, in hexadecimal digits; the same on every rank.

    Raises:
        MpitrainError: Ranks have different tensors; on every rank.
    """
    digests = {name: _digest(tensor) for name, tensor in state.items() if isinstance(tensor, torch.Tensor)}
    everybodys: list[dict[str, str]] = comm.allgather_obj(digests)
    first = everybodys[0]
    differing = {
        rank: sorted({name for name, _ in others.items() ^ first.items()})
        for rank, others in enumerate(everybodys)
        if others != first
    }
    if differing:
        rank, names = next(iter(differing.items()))
        raise MpitrainError(
            f"replicas: ranks {sorted(differing)} differ from rank 0, rank {rank} in {', '.join(names[:5])}"
            f"{' and others' if len(names) > 5 else ''}; broadcast the parameters before the first step, "
            "and change them by synchronized steps only"
        )
    return hashlib.sha256(repr(sorted(digests.items())).encode()).hexdigest()


def _digest(tensor: torch.Tensor) -> str:
    content = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{content.dtype} {list(content.shape)} ".encode())
    # The bytes themselves: equal numbers may differ in bits, and bfloat16 is unknown to NumPy.
    digest.update(content.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
