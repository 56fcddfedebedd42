"""Models with random data whose training steps are timed: small enough for processors, and typical in their parts.

Linear layers that have many parameters for little work, a GPT with the parameters spread over many tensors, and a
residual network of convolutions that has few parameters for much work.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn

__all__ = ["MODELS", "TrainingTask"]

_MLP_WIDTHS = (1024, 3072, 3072, 3072, 1024)
_GPT_WIDTH, _GPT_LAYERS, _GPT_CONTEXT, _GPT_VOCABULARY = 256, 4, 128, 1024
_RESNET_WIDTHS = (32, 64, 128, 256)
_IMAGE_SIDE = 32
_NUM_CLASSES = 100


@dataclasses.dataclass(frozen=True)
class TrainingTask:
    """A model, and what it is to learn.

    Attributes:
        make_model: Makes the model; the same one after the same seed.
        make_batch: Makes inputs and targets of so many samples.
        loss: Of outputs and targets.
        batch: Usual samples per rank and step.
    """

    make_model: Callable[[], nn.Module]
    make_batch: Callable[[int, torch.Generator], tuple[Tensor, Tensor]]
    loss: Callable[[Tensor, Tensor], Tensor]
    batch: int


def _mlp() -> nn.Module:
    """25 million parameters in four layers."""
    layers: list[nn.Module] = []
    for width, next_width in itertools.pairwise(_MLP_WIDTHS):
        layers += [nn.Linear(width, next_width), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _mlp_batch(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    inputs = torch.randn(count, _MLP_WIDTHS[0], generator=generator)
    return inputs, torch.randn(count, _MLP_WIDTHS[-1], generator=generator)


class _GPT(nn.Module):
    """Predicts each next token of a window of tokens; 4 million parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(_GPT_VOCABULARY, _GPT_WIDTH)
        self.positions = nn.Parameter(torch.zeros(_GPT_CONTEXT, _GPT_WIDTH))
        layer = nn.TransformerEncoderLayer(
            _GPT_WIDTH, _GPT_WIDTH // 32, 4 * _GPT_WIDTH, dropout=0.0, activation="gelu", batch_first=True
        )
        self.blocks = nn.TransformerEncoder(layer, _GPT_LAYERS)
        self.scores = nn.Linear(_GPT_WIDTH, _GPT_VOCABULARY)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(_GPT_CONTEXT))

    def forward(self, tokens: Tensor) -> Tensor:
        """Map (batch, position) to scores (batch x position, vocabulary)."""
        hidden = self.blocks(self.tokens(tokens) + self.positions, mask=self.mask, is_causal=True)
        return self.scores(hidden).flatten(0, 1)  # type: ignore[no-any-return]


def _gpt_batch(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    text = torch.randint(_GPT_VOCABULARY, (count, _GPT_CONTEXT + 1), generator=generator)
    return text[:, :-1].contiguous(), text[:, 1:].flatten()


class _Residual(nn.Module):
    """Two convolutions, added to what comes in."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.straight = nn.Sequential(
            nn.Conv2d(width_in, width, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
        )
        self.around = nn.Conv2d(width_in, width, 1, stride, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        """Map (batch, width_in, side, side) to (batch, width, side / stride, side / stride)."""
        return torch.relu(self.straight(images) + self.around(images))


def _resnet() -> nn.Module:
    """3 million parameters, two residual blocks at each of four resolutions."""
    layers: list[nn.Module] = [nn.Conv2d(3, _RESNET_WIDTHS[0], 3, padding=1)]
    width_in = _RESNET_WIDTHS[0]
    for index, width in enumerate(_RESNET_WIDTHS):
        layers += [_Residual(width_in, width, 1 if index == 0 else 2), _Residual(width, width, 1)]
        width_in = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width_in, _NUM_CLASSES))


def _image_batch(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    images = torch.randn(count, 3, _IMAGE_SIDE, _IMAGE_SIDE, generator=generator)
    return images, torch.randint(_NUM_CLASSES, (count,), generator=generator)


MODELS = {
    "mlp": TrainingTask(_mlp, _mlp_batch, nn.functional.mse_loss, 64),
    "gpt": TrainingTask(_GPT, _gpt_batch, nn.functional.cross_entropy, 4),
    "resnet": TrainingTask(_resnet, _image_batch, nn.functional.cross_entropy, 16),
}
"""By the name that options give them."""
