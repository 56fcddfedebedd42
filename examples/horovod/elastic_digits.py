"""Trains on scikit-learn's handwritten digits, and takes up from the last commit what a failure has interrupted."""

from __future__ import annotations

import argparse

import horovod.torch as hvd
import sklearn.datasets
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=32, help="of each rank")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--lr", type=float, default=0.02, help="for one rank")
    parser.add_argument("--batches-per-commit", type=int, default=10)
    return parser.parse_args()


def load_digits() -> TensorDataset:
    digits = sklearn.datasets.load_digits()
    return TensorDataset(torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target))


def main() -> None:
    args = parse_arguments()
    hvd.init()
    torch.manual_seed(42)
    torch.set_num_threads(1)
    data = load_digits()
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr * hvd.size(), momentum=0.9)
    optimizer = hvd.DistributedOptimizer(optimizer, named_parameters=model.named_parameters())
    sampler = hvd.elastic.ElasticSampler(data, shuffle=True)
    loader = DataLoader(data, batch_size=args.batch_size, sampler=sampler)

    def on_state_reset() -> None:
        # The learning rate goes with the number of ranks.
        for group in optimizer.param_groups:
            group["lr"] = args.lr * hvd.size()

    @hvd.elastic.run
    def train(state: hvd.elastic.TorchState) -> float:
        loss = torch.tensor(0.0)
        while state.epoch < args.epochs:
            for images, labels in loader:
                optimizer.zero_grad()
                loss = F.cross_entropy(model(images), labels)
                loss.backward()
                optimizer.step()
                state.sampler.record_batch(state.batch, args.batch_size)
                state.batch += 1
                if state.batch % args.batches_per_commit == 0:
                    state.commit()
            mean = hvd.allreduce(loss.detach(), name="loss").item()
            if hvd.rank() == 0:
                print(f"epoch {state.epoch + 1} loss {mean:.4f} after {state.batch} batches", flush=True)
            state.epoch += 1
            state.batch = 0
            # At the end of the epoch: before its beginning, it would forget the batches done before a failure.
            state.sampler.set_epoch(state.epoch)
            state.commit()
        return accuracy(model, data)

    state = hvd.elastic.TorchState(model=model, optimizer=optimizer, sampler=sampler, epoch=0, batch=0)
    state.register_reset_callbacks([on_state_reset])
    reached = train(state)
    if hvd.rank() == 0:
        print(f"accuracy {reached:.3f}", flush=True)


def accuracy(model: nn.Module, data: TensorDataset) -> float:
    with torch.no_grad():
        images, labels = data.tensors
        return (model(images).argmax(dim=1) == labels).float().mean().item()


if __name__ == "__main__":
    main()
