"""Trains a small GPT on the characters of the source text of Python's standard library.

mpirun -np 2 python scripts/train_gpt.py
"""

from __future__ import annotations

import sys
import sysconfig
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import mpitrain.torch as hvd
from job.devices import take_device
from job.options import UsageError, make_parser, positive
from job.training import Totals, Workload, run_job

# Fixed, so that a checkpoint fits whatever text another machine has.
CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))
UNKNOWN = CHARACTERS.index("?")
HEAD_WIDTH = 32
MOST_CHARACTERS = 2_000_000
NUM_TEST_WINDOWS = 200


class Block(nn.Module):
    """Causal self-attention, then two linear layers, each added to what comes in."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attention_norm = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (batch, position, width) to the same shape."""
        heads = self.query_key_value(self.attention_norm(x)).unflatten(-1, (3, self.num_heads, -1))
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.attention_out(attended.transpose(1, 2).flatten(2))
        return x + self.feed_forward(x)  # type: ignore[no-any-return]


class GPT(nn.Module):
    """Predicts each next token of a window of tokens."""

    def __init__(self, vocabulary: int, context: int, num_layers: int, width: int, num_heads: int) -> None:
        super().__init__()
        self.context = context
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, num_heads) for _ in range(num_layers)))
        self.out = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, vocabulary))
        for embedding in (self.tokens, self.positions):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Map tokens (batch, position) to scores (batch, position, vocabulary) of the tokens that follow."""
        positions = self.positions.weight[: tokens.shape[1]]
        return self.out(self.blocks(self.tokens(tokens) + positions))  # type: ignore[no-any-return]

    def continue_text(self, tokens: torch.Tensor, num_tokens: int, generator: torch.Generator) -> torch.Tensor:
        """Return one row of tokens with so many more, each drawn as likely as the model finds it."""
        for _ in range(num_tokens):
            scores = self(tokens[None, -self.context :])[0, -1]
            # Drawn on the host, so that the text is the same wherever the model is.
            drawn = torch.multinomial(scores.softmax(dim=-1).cpu(), 1, generator=generator)
            tokens = torch.cat([tokens, drawn.to(tokens.device)])
        return tokens


def read_text() -> str:
    """Return the source text of the standard library's modules, by name, up to a length."""
    parts: list[str] = []
    length = 0
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        parts.append(path.read_text(encoding="utf-8", errors="replace"))
        length += len(parts[-1])
        if length >= MOST_CHARACTERS:
            break
    return "".join(parts)[:MOST_CHARACTERS]


def encode(text: str) -> torch.Tensor:
    """Return the numbers of characters."""
    number = {character: index for index, character in enumerate(CHARACTERS)}
    return torch.tensor([number.get(character, UNKNOWN) for character in text])


def decode(tokens: torch.Tensor) -> str:
    """Return the characters of numbers."""
    return "".join(CHARACTERS[index] for index in tokens.tolist())


def make_workload(options: Namespace) -> Workload:
    """Return the job: windows of the last tenth of the text are for testing, those before for training."""
    if options.width % HEAD_WIDTH:
        raise UsageError(f"--width: must be a multiple of {HEAD_WIDTH}, got {options.width}")
    context, device = options.context, take_device(options)
    # Nodes may have different versions of Python; all ranks take rank 0's text.
    tokens = encode(hvd.broadcast_object(read_text() if hvd.rank() == 0 else None, name="text")).to(device)
    num_windows = (len(tokens) - 1) // context
    num_samples = num_windows * 9 // 10
    inputs = tokens[: num_windows * context].view(num_windows, context)
    targets = tokens[1 : num_windows * context + 1].view(num_windows, context)
    model = GPT(len(CHARACTERS), context, options.layers, options.width, num_heads=options.width // HEAD_WIDTH)
    model = model.to(device)

    def scores_and_targets(windows: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        return model(inputs[windows]).flatten(0, 1), targets[windows].flatten()

    def evaluate(indices: Sequence[int]) -> Totals:
        totals = Totals(0, 0.0, 0)
        for begin in range(0, len(indices), 16):
            scores, wanted = scores_and_targets([num_samples + index for index in indices[begin : begin + 16]])
            totals = Totals(
                totals.count + len(wanted),
                totals.loss + F.cross_entropy(scores, wanted, reduction="sum").item(),
                totals.correct + int((scores.argmax(dim=1) == wanted).sum()),
            )
        return totals

    def sample() -> str:
        generator = torch.Generator().manual_seed(options.seed)
        return decode(model.continue_text(encode("def ").to(device), options.sample, generator))

    return Workload(
        model=model,
        make_optimizer=lambda params, lr: torch.optim.AdamW(params, lr=lr),
        num_samples=num_samples,
        batch_loss=lambda windows: F.cross_entropy(*scores_and_targets(windows)),
        num_test_samples=min(NUM_TEST_WINDOWS, num_windows - num_samples),
        evaluate=evaluate,
        num_steps=options.steps,
        report_steps=options.report_steps,
        max_grad_norm=1.0,
        epilogue=sample,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the job; return the exit status."""
    parser = make_parser("Train a small GPT on Python source text.", batch_size=24, lr=1e-3, lr_batch_size=12)
    parser.add_argument("--steps", type=positive, default=300, metavar="N", help="optimizer steps")
    parser.add_argument("--report-steps", type=positive, default=50, metavar="N", help="steps between evaluations")
    parser.add_argument("--context", type=positive, default=64, metavar="N", help="characters that are looked at")
    parser.add_argument("--layers", type=positive, default=4, metavar="N", help="of attention")
    parser.add_argument("--width", type=positive, default=128, metavar="N", help="of layers; a multiple of 32")
    parser.add_argument("--sample", type=positive, default=200, metavar="N", help="characters to write at the end")
    return run_job(parser, make_workload, arguments)


if __name__ == "__main__":
    sys.exit(main())
