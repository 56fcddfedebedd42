"""Batch normalization over the batches of all ranks together."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from mpitrain.torch.gathers import only_gathered
from mpitrain.torch.handles import synchronize
from mpitrain.torch.reductions import Sum, allreduce
from mpitrain.torch.starting import Operation
from mpitrain.torch.world import ProcessSet, global_process_set

__all__ = ["SyncBatchNorm"]

Tensor = torch.Tensor


class SyncBatchNorm(_BatchNorm):
    """`torch.nn.BatchNorm*d` whose mean and variance are those of the batches of all ranks, as if they were one.

    Ranks may have batches of different size, also empty ones; all ranks must run the layer, and its backward pass, as
    often as the others. Gradients of weight and bias are those of this rank's part, to be summed or averaged
    over the ranks as all others are. A layer that uses its running statistics, in evaluation, needs no other rank.

    Cost: forward one exchange of 2 `num_features` + 1 float64 per rank, backward one of 2 `num_features`.
    Source: the merging of means and variances is that of Chan, Golub and LeVeque, Updating Formulae and a Pairwise
        Algorithm for Computing Sample Variances, 1979, for any number of parts.

    Args:
        num_features: Size of dimension 1 of the input, which has shape `(N, C)` or `(N, C, ...)`.
        eps: See `torch.nn.BatchNorm1d`; likewise the next three.
        momentum: See above.
        affine: See above.
        track_running_stats: See above.
        process_set: Whose ranks normalize together; others do so alone.
        device: See `torch.nn.BatchNorm1d`.
        dtype: See `torch.nn.BatchNorm1d`.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_set: ProcessSet = global_process_set,
        *,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        self.process_set = process_set

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  (torch's name)
        """Normalize.

        Raises:
            ValueError: Fewer than two dimensions; or one value per channel in the batches of all ranks together, on
                every rank.
            HorovodInternalError: Ranks have different numbers of channels, or could not exchange messages; on every
                rank.
        """
        uses_batch = self.training or self.running_mean is None
        if not uses_batch or self.process_set.size() == 1 or self._is_outside():
            return super().forward(input)
        with _gathering_statistics(self.process_set):
            self._check_input_dim(input)
        factor = self._count_batch() if self.training and self.track_running_stats else 0.0
        arguments = input, self.weight, self.bias, self.eps, self.process_set
        output, mean, variance, total = _Normalize.apply(*arguments)  # type: ignore[no-untyped-call]
        if factor and total:
            assert self.running_mean is not None
            assert self.running_var is not None
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), factor)
            unbiased = variance * (total / (total - 1))
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), factor)
        return output  # type: ignore[no-any-return]

    @classmethod
    def convert_sync_batchnorm(
        cls, module: torch.nn.Module, process_set: ProcessSet = global_process_set
    ) -> torch.nn.Module:
        """Return the module with each `torch.nn.BatchNorm*d` in it replaced; parameters and buffers stay the same ones.

        Args:
            module: Is changed, unless it is a batch normalization itself.
            process_set: Of the new layers.
        """
        converted = module
        if isinstance(module, _BatchNorm) and not isinstance(module, cls):
            converted = cls(
                module.num_features,
                module.eps,
                module.momentum,
                module.affine,
                module.track_running_stats,
                process_set,
            )
            converted.weight, converted.bias = module.weight, module.bias
            converted.running_mean, converted.running_var = module.running_mean, module.running_var
            converted.num_batches_tracked = module.num_batches_tracked
            converted.train(module.training)
        for name, child in module.named_children():
            replaced = cls.convert_sync_batchnorm(child, process_set)
            if replaced is not child:
                converted.add_module(name, replaced)
        return converted

    def _check_input_dim(self, input: Tensor) -> None:  # noqa: A002  (torch's name)
        if input.dim() < 2:
            raise ValueError(f"SyncBatchNorm: input must have at least 2 dimensions, got {input.dim()}; add one")
        if input.shape[1] != self.num_features:
            raise ValueError(
                f"SyncBatchNorm: input must have {self.num_features} channels in dimension 1, got {list(input.shape)}; "
                "set num_features to their number"
            )

    def _is_outside(self) -> bool:
        return self.process_set.process_set_id is not None and not self.process_set.included()

    def _count_batch(self) -> float:
        """Return the weight of this batch in the running statistics."""
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        return 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum


class _Normalize(torch.autograd.Function):
    """Normalizes with the statistics of all ranks, and returns these as well."""

    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, process_set: ProcessSet
    ) -> tuple[Tensor, Tensor, Tensor, int]:
        wide = _widened(inputs)
        mean, variance, total = _statistics(wide, process_set)
        scale = torch.rsqrt(variance + eps)
        centered = wide - _per_channel(mean, wide)
        weighted = scale if weight is None else scale * weight.to(scale.dtype)
        shift = torch.zeros_like(mean) if bias is None else bias.to(mean.dtype)
        output = torch.addcmul(_per_channel(shift, wide), centered, _per_channel(weighted, wide))
        ctx.save_for_backward(inputs, weight, mean, scale)
        ctx.total, ctx.process_set = total, process_set
        ctx.mark_non_differentiable(mean, variance)
        return output.to(inputs.dtype), mean, variance, total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        inputs, weight, mean, scale = ctx.saved_tensors
        wide_grad, wide = _widened(grad), _widened(inputs)
        dims = _reduced_dims(wide)
        centered = wide - _per_channel(mean, wide)
        sums = torch.stack([wide_grad.sum(dims), (wide_grad * centered).sum(dims)])
        grad_weight = None if weight is None else (sums[1] * scale).to(weight.dtype)
        grad_bias = None if weight is None else sums[0].to(weight.dtype)
        grad_input = None
        if ctx.needs_input_grad[0]:
            everybodys = allreduce(
                sums.to(torch.float64), name="sync_batch_norm.gradient", op=Sum, process_set=ctx.process_set
            )
            means = everybodys / max(1, ctx.total)
            slope = (means[1] * scale.to(torch.float64) ** 2).to(wide.dtype)
            rest = wide_grad - _per_channel(means[0].to(wide.dtype), wide)
            rest.addcmul_(centered, _per_channel(slope, wide), value=-1)
            weighted = scale if weight is None else scale * weight.to(scale.dtype)
            grad_input = rest.mul_(_per_channel(weighted, wide)).to(inputs.dtype)
        return grad_input, grad_weight, grad_bias, None, None


def _gathering_statistics(process_set: ProcessSet) -> Operation:
    return Operation("allgather", "sync_batch_norm.statistics", process_set)


def _statistics(inputs: Tensor, process_set: ProcessSet) -> tuple[Tensor, Tensor, int]:
    """Return mean and variance of each channel, and the number of values per channel, over the inputs of all ranks."""
    with _gathering_statistics(process_set) as operation:
        count = inputs.shape[0] * math.prod(inputs.shape[2:])
        mine = torch.zeros(3, inputs.shape[1], dtype=torch.float64)
        if count:
            variance, mean = torch.var_mean(inputs, _reduced_dims(inputs), correction=0)
            mine[0], mine[1] = mean, variance * count
            mine[2] = count
        # Means and sums of squared deviations from them: sums of squares would lose what is small beside the mean.
        everybodys = synchronize(operation.start([mine[None]], only_gathered))
    means, squares, counts = everybodys.unbind(1)
    total = int(counts[:, 0].sum())
    if total == 1:
        raise ValueError(
            "Expected more than 1 value per channel when training, got 1 on all ranks together; use larger batches"
        )
    mean = (means * counts).sum(0) / max(1, total)
    variance = (squares + counts * (means - mean) ** 2).sum(0) / max(1, total)
    return mean.to(inputs.dtype), variance.to(inputs.dtype), total


def _widened(tensor: Tensor) -> Tensor:
    """Return the tensor in a dtype that statistics can be computed in."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _reduced_dims(tensor: Tensor) -> list[int]:
    return [0, *range(2, tensor.dim())]


def _per_channel(values: Tensor, tensor: Tensor) -> Tensor:
    """Return values of the channels in a shape that fits the tensor's."""
    return values.view(1, -1, *[1] * (tensor.dim() - 2))
