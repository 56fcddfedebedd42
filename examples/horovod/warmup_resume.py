"""Trains as large image collections are trained: warm-up, several batches per step, checkpoints, averaged metrics."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import horovod.torch as hvd
import sklearn.datasets
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

NUM_VALIDATION_SAMPLES = 360


class Metric:
    """The mean of a value over batches and ranks."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.sum = torch.tensor(0.0)
        self.count = torch.tensor(0.0)

    def update(self, value: torch.Tensor) -> None:
        """Add the value of one batch on each rank."""
        self.sum += hvd.allreduce(value.detach(), name=self.name)
        self.count += 1

    @property
    def avg(self) -> float:
        """The mean so far."""
        return (self.sum / self.count).item()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--checkpoint-format", default="./checkpoint-{epoch}.pt", help="one file per epoch")
    parser.add_argument("--fp16-allreduce", action="store_true", help="send gradients with 16 bits")
    parser.add_argument("--batches-per-allreduce", type=int, default=2, help="batches whose gradients make up a step")
    parser.add_argument("--batch-size", type=int, default=16, help="of each rank and batch")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--base-lr", type=float, default=0.01, help="for one rank and one batch per step")
    parser.add_argument("--warmup-epochs", type=float, default=2.0)
    parser.add_argument("--momentum", type=float, default=0.9)
    parser.add_argument("--wd", type=float, default=5e-5, help="weight decay")
    parser.add_argument("--seed", type=int, default=42)
    return parser.parse_args()


def find_last_epoch(args: argparse.Namespace) -> int:
    """Return the last epoch that rank 0 finds a checkpoint of, on all ranks; 0 if there is none."""
    last = 0
    for epoch in range(args.epochs, 0, -1):
        if Path(args.checkpoint_format.format(epoch=epoch)).exists():
            last = epoch
            break
    return hvd.broadcast(torch.tensor(last), root_rank=0, name="resume_from_epoch").item()


def adjust_learning_rate(args: argparse.Namespace, optimizer: torch.optim.Optimizer, progress: float) -> None:
    """Grow from the rate of one rank to that of all of them, then step down.

    Args:
        args: Of the command line.
        optimizer: Whose rate is set.
        progress: Epochs since the beginning.
    """
    if progress < args.warmup_epochs:
        adjustment = 1 / hvd.size() * (progress * (hvd.size() - 1) / args.warmup_epochs + 1)
    else:
        adjustment = 1.0 if progress < 0.8 * args.epochs else 0.1
    for group in optimizer.param_groups:
        group["lr"] = args.base_lr * hvd.size() * args.batches_per_allreduce * adjustment


def accuracy(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return (scores.argmax(dim=1) == labels).float().mean()


def train(
    args: argparse.Namespace, model: nn.Module, optimizer: torch.optim.Optimizer, loader: DataLoader, epoch: int
) -> None:
    model.train()
    train_loss, train_accuracy = Metric("train_loss"), Metric("train_accuracy")
    for index, (images, labels) in enumerate(loader):
        adjust_learning_rate(args, optimizer, epoch + index / len(loader))
        optimizer.zero_grad()
        parts = range(0, len(labels), args.batch_size)
        for begin in parts:
            scores = model(images[begin : begin + args.batch_size])
            targets = labels[begin : begin + args.batch_size]
            loss = F.cross_entropy(scores, targets)
            train_loss.update(loss)
            train_accuracy.update(accuracy(scores, targets))
            # The mean over the parts, as their gradients are summed.
            loss.div_(math.ceil(len(labels) / args.batch_size))
            loss.backward()
        optimizer.step()
    if hvd.rank() == 0:
        rate = optimizer.param_groups[0]["lr"]
        print(f"epoch {epoch + 1} train loss {train_loss.avg:.4f} accuracy {train_accuracy.avg:.3f} lr {rate:.4f}")


def validate(model: nn.Module, loader: DataLoader, epoch: int) -> None:
    model.eval()
    loss, correct = Metric("val_loss"), Metric("val_accuracy")
    with torch.no_grad():
        for images, labels in loader:
            scores = model(images)
            loss.update(F.cross_entropy(scores, labels))
            correct.update(accuracy(scores, labels))
    if hvd.rank() == 0:
        print(f"epoch {epoch + 1} validation loss {loss.avg:.4f} accuracy {correct.avg:.3f}", flush=True)


def save_checkpoint(args: argparse.Namespace, model: nn.Module, optimizer: torch.optim.Optimizer, epoch: int) -> None:
    if hvd.rank() == 0:
        path = args.checkpoint_format.format(epoch=epoch + 1)
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path)


def load_data(args: argparse.Namespace) -> tuple[DistributedSampler, DataLoader, DataLoader]:
    digits = sklearn.datasets.load_digits()
    images = torch.tensor(digits.data, dtype=torch.float32) / 16
    labels = torch.tensor(digits.target)
    split = len(labels) - NUM_VALIDATION_SAMPLES
    train_data = TensorDataset(images[:split], labels[:split])
    sampler = DistributedSampler(train_data, num_replicas=hvd.size(), rank=hvd.rank(), drop_last=True)
    train_loader = DataLoader(
        train_data, batch_size=args.batch_size * args.batches_per_allreduce, sampler=sampler, drop_last=True
    )
    validation = TensorDataset(images[split:], labels[split:])
    validation_sampler = DistributedSampler(validation, num_replicas=hvd.size(), rank=hvd.rank())
    return sampler, train_loader, DataLoader(validation, batch_size=60, sampler=validation_sampler)


def main() -> None:
    args = parse_arguments()
    hvd.init()
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)
    first_epoch = find_last_epoch(args)
    sampler, train_loader, validation_loader = load_data(args)

    model = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=args.base_lr * args.batches_per_allreduce * hvd.size(),
        momentum=args.momentum,
        weight_decay=args.wd,
    )
    optimizer = hvd.DistributedOptimizer(
        optimizer,
        named_parameters=model.named_parameters(),
        compression=hvd.Compression.fp16 if args.fp16_allreduce else hvd.Compression.none,
        backward_passes_per_step=args.batches_per_allreduce,
        op=hvd.Average,
    )
    # Only rank 0 reads the checkpoint; the broadcasts bring it to the others.
    if first_epoch > 0 and hvd.rank() == 0:
        checkpoint = torch.load(args.checkpoint_format.format(epoch=first_epoch), weights_only=True)
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)

    for epoch in range(first_epoch, args.epochs):
        sampler.set_epoch(epoch)
        train(args, model, optimizer, train_loader, epoch)
        validate(model, validation_loader, epoch)
        save_checkpoint(args, model, optimizer, epoch)


if __name__ == "__main__":
    main()
