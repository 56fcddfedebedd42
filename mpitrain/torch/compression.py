"""How tensors travel: as they are, or as 16-bit floats."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["Compression", "Compressor"]


class Compressor:
    """Turns a tensor into what travels, and back. The base class changes nothing.

    Attributes:
        wire_dtype: Dtype in which floating-point tensors travel; None for their own.
    """

    wire_dtype: torch.dtype | None = None

    @classmethod
    def compress(cls, tensor: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """Return what travels, and what `decompress` needs to know."""
        if cls.wire_dtype is None or not tensor.dtype.is_floating_point:
            return tensor, None
        return tensor.to(cls.wire_dtype), tensor.dtype

    @classmethod
    def decompress(cls, tensor: torch.Tensor, context: Any) -> torch.Tensor:
        """Return a tensor of the original dtype."""
        return tensor if context is None else tensor.to(context)


class _Half(Compressor):
    wire_dtype = torch.float16


class _BFloat16(Compressor):
    wire_dtype = torch.bfloat16


class Compression:
    """The compressors by name; pass one of them as `compression=`."""

    none = Compressor
    fp16 = _Half
    bf16 = _BFloat16
