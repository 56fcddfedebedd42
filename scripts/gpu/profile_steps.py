"""Profiles training steps on a device, and counts what they wait for.

mpirun -np 2 python scripts/gpu/profile_steps.py --json FILE
"""

from __future__ import annotations

import argparse
import json
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

import mpitrain.torch as hvd
from gpu.synchronizations import Span, count_waits
from job.devices import take_device

_STEP = "training step"
_WIDTH = 2048


def profiled_waits(num_steps: int) -> dict[str, int]:
    """Train a network with several buckets; return what the calling rank's steps waited for."""
    device = take_device(Namespace(device="cuda"))
    layers = [torch.nn.Sequential(torch.nn.Linear(_WIDTH, _WIDTH), torch.nn.ReLU()) for _ in range(8)]
    model = torch.nn.Sequential(*layers).to(device)
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=1e-3), model.named_parameters())
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    inputs = torch.randn(64, _WIDTH, device=device)

    def step() -> None:
        optimizer.zero_grad()
        model(inputs).square().mean().backward()
        optimizer.step()

    # The first one learns the order of the gradients, and further ones compile kernels.
    for _ in range(5):
        step()
    torch.cuda.synchronize()
    # The profiler itself waits for the device where it begins and ends, so only what is within steps counts.
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        for _ in range(num_steps):
            with record_function(_STEP):
                step()
        torch.cuda.synchronize()
    # Of the host; the device has spans of the same names.
    events = [event for event in profiler.events() if event.device_type.name == "CPU"]
    spans = [Span(event.name, event.time_range.start, event.time_range.end) for event in events]
    steps = [span for span in spans if span.name == _STEP]
    assert len(steps) >= num_steps
    return count_waits(spans, steps)


def main(arguments: Sequence[str] | None = None) -> int:
    """Profile; rank 0 writes what came of it."""
    parser = argparse.ArgumentParser(description="Profile training steps on a device.")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args(arguments)
    hvd.init()
    everybodys = hvd.allgather_object(profiled_waits(options.steps))
    if hvd.rank() == 0:
        names = sorted({name for waits in everybodys for name in waits})
        waits = {name: sum(each.get(name, 0) for each in everybodys) for name in names}
        result = {"profiles": [{"ranks": hvd.size(), "steps": options.steps, "waits": waits}]}
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    hvd.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
