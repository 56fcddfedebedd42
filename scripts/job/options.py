"""The command line of a training script."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NoReturn

__all__ = ["Parser", "UsageError", "make_parser", "positive"]


class UsageError(Exception):
    """The options cannot be used. It is the same on every rank."""


class Parser(argparse.ArgumentParser):
    """Raises what is wrong instead of printing it, as every rank of a job would."""

    def error(self, message: str) -> NoReturn:
        """Raise a `UsageError`."""
        raise UsageError(f"{message}; --help lists all options")


def positive(text: str) -> int:
    """Parse a number that is at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def make_parser(description: str, *, batch_size: int, lr: float, lr_batch_size: int) -> Parser:
    """Return a parser with the options that all jobs have; the numbers are defaults."""
    parser = Parser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument(
        "--batch-size",
        type=positive,
        default=batch_size,
        metavar="N",
        help="samples per step of all ranks together",
    )
    parser.add_argument(
        "--lr", type=float, default=lr, help=f"for batches of {lr_batch_size} samples; scaled with the batch"
    )
    parser.add_argument("--warmup-steps", type=int, default=20, metavar="N", help="until the scaled rate")
    parser.add_argument("--seed", type=int, default=1, help="of the parameters and of the order of samples")
    parser.add_argument(
        "--checkpoint", type=Path, metavar="PATH", help="save there, at each report and when told to stop"
    )
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint, at any number of ranks")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="ranks share the devices of a node")
    parser.add_argument("--algorithm", metavar="NAME", help="of the all-reduce of gradients")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write what came of it there")
    parser.set_defaults(lr_batch_size=lr_batch_size)
    return parser
