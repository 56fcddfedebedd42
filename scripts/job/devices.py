"""Where a training job computes."""

from __future__ import annotations

from argparse import Namespace

import torch

import mpitrain.torch as hvd
from job.options import UsageError

__all__ = ["take_device"]


def take_device(options: Namespace) -> torch.device:
    """Return the device of this rank, and make it the current one. After `hvd.init`.

    Raises:
        UsageError: A device is asked for and there is none.
    """
    if options.device == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if not count:
        raise UsageError("--device: torch sees no CUDA device; look at nvidia-smi, or use --device cpu")
    torch.cuda.set_device(hvd.local_rank() % count)
    return torch.device("cuda", torch.cuda.current_device())
