"""Trains a small convolutional network on scikit-learn's handwritten digits.

mpirun -np 2 python scripts/train_digits.py
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Sequence

import sklearn.datasets
import torch
import torch.nn.functional as F
from torch import nn

from job.devices import take_device
from job.options import make_parser, positive
from job.training import Totals, Workload, run_job

NUM_TEST_SAMPLES = 360


class DigitsNet(nn.Sequential):
    """Three convolutions and a linear layer; nothing in it depends on how a batch is divided among ranks."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 64, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(64, 128, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(128, 256, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(1024, 10),
        )
        for layer in self:
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")


def load_digits() -> tuple[torch.Tensor, torch.Tensor]:
    """Return 1797 images of 8 by 8 pixels from 0 to 1, and their digits, always in one order."""
    digits = sklearn.datasets.load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16.0
    return images[order], torch.tensor(digits.target)[order]


def make_workload(options: Namespace) -> Workload:
    """Return the job: the last samples are for testing, the others for training."""
    device = take_device(options)
    images, labels = (tensor.to(device) for tensor in load_digits())
    num_samples = len(labels) - NUM_TEST_SAMPLES
    model = DigitsNet().to(device)

    def batch_loss(indices: Sequence[int]) -> torch.Tensor:
        return F.cross_entropy(model(images[indices]), labels[indices])

    def evaluate(indices: Sequence[int]) -> Totals:
        chosen = num_samples + torch.tensor(list(indices), dtype=torch.int64)
        scores = model(images[chosen])
        return Totals(
            count=len(chosen),
            loss=F.cross_entropy(scores, labels[chosen], reduction="sum").item(),
            correct=int((scores.argmax(dim=1) == labels[chosen]).sum()),
        )

    steps_per_epoch = num_samples // options.batch_size
    return Workload(
        model=model,
        make_optimizer=lambda params, lr: torch.optim.SGD(params, lr=lr, momentum=0.9),
        num_samples=num_samples,
        batch_loss=batch_loss,
        num_test_samples=NUM_TEST_SAMPLES,
        evaluate=evaluate,
        num_steps=options.epochs * steps_per_epoch,
        report_steps=max(1, steps_per_epoch),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the job; return the exit status."""
    parser = make_parser("Train a small CNN on handwritten digits.", batch_size=96, lr=0.01, lr_batch_size=32)
    parser.add_argument("--epochs", type=positive, default=10, metavar="N", help="passes over the samples")
    return run_job(parser, make_workload, arguments)


if __name__ == "__main__":
    sys.exit(main())
