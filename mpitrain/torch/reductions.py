"""All-reduce of tensors by name, with Horovod's names and arguments.

Ranks may start operations in any order; those of one name belong together. Operations without a name are matched by
how many were started before on each rank. A mismatch raises `HorovodInternalError` on every rank, and everything
stays usable.

Gradients are pulled back by an all-reduce with the same reduction and factors, also of Adasum, as Horovod does; for
minimum, maximum and product see `nonlinear`. What is asynchronous or in place is outside autograd.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from mpitrain.memory import ReduceOp, parse_op
from mpitrain.torch.compression import Compression, Compressor
from mpitrain.torch.gradients import PullBack, carry_gradients
from mpitrain.torch.nonlinear import carry_nonlinear_gradients
from mpitrain.torch.starting import Operation, only_result
from mpitrain.torch.world import ProcessSet, global_process_set

__all__ = [
    "Adasum",
    "Average",
    "Max",
    "Min",
    "Product",
    "Sum",
    "allreduce",
    "allreduce_",
    "allreduce_async",
    "allreduce_async_",
    "grouped_allreduce",
    "grouped_allreduce_",
    "grouped_allreduce_async",
    "grouped_allreduce_async_",
]

Average = ReduceOp.AVERAGE
Sum = ReduceOp.SUM
Adasum = ReduceOp.ADASUM
Min = ReduceOp.MIN
Max = ReduceOp.MAX
Product = ReduceOp.PRODUCT

Tensor = torch.Tensor


def allreduce_async(
    tensor: Tensor,
    average: bool | None = None,
    name: str | None = None,
    op: ReduceOp | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> int:
    """Start an `allreduce`; returns a handle for `poll` and `synchronize`."""
    with Operation("allreduce", name, process_set) as operation:
        how = _how(average, op, prescale_factor, postscale_factor)
        return _start(operation, [tensor], how, only_result)


def allreduce_async_(
    tensor: Tensor,
    average: bool | None = None,
    name: str | None = None,
    op: ReduceOp | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> int:
    """Start an `allreduce_`; returns a handle. The tensor must be left alone until it is synchronized."""
    with Operation("allreduce", name, process_set) as operation:
        how = _how(average, op, prescale_factor, postscale_factor)
        return _start(operation, [tensor], how, only_result, in_place=True)


def allreduce(
    tensor: Tensor,
    average: bool | None = None,
    name: str | None = None,
    compression: type[Compressor] = Compression.none,
    op: ReduceOp | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> Tensor:
    """Reduce a tensor over all ranks.

    Args:
        tensor: Any shape; shape and dtype the same on every rank.
        average: Older spelling of `op`: True is `Average`, False is `Sum`.
        name: Same on every rank.
        compression: How the tensor travels.
        op: `Average` (default), `Sum`, `Adasum`, `Min`, `Max` or `Product`. Averages of integers are truncated toward
            zero. `Adasum` takes floating-point tensors, and any number of ranks: where that is no power of two, the
            first ranks are combined in pairs before.
        prescale_factor: Multiplies the tensor before the reduction.
        postscale_factor: Multiplies the result.
        process_set: Whose ranks take part.

    Returns:
        A new tensor of the same shape and dtype.

    Raises:
        HorovodInternalError: Ranks brought different things, or could not exchange messages; on every rank.
        ValueError: Bad argument, a dtype that the reduction is not defined for, or a name in flight.
    """
    with Operation("allreduce", name, process_set) as operation:
        how = _how(average, op, prescale_factor, postscale_factor)
        compressed, context = compression.compress(tensor)
        (result,) = _reduce(operation, [compressed], how, process_set)
        return compression.decompress(result, context)


def allreduce_(
    tensor: Tensor,
    average: bool | None = None,
    name: str | None = None,
    op: ReduceOp | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> Tensor:
    """Reduce a tensor over all ranks in place; see `allreduce`."""
    with Operation("allreduce", name, process_set) as operation:
        how = _how(average, op, prescale_factor, postscale_factor)
        return _run(operation, [tensor], how, only_result, in_place=True)  # type: ignore[no-any-return]


def grouped_allreduce_async(
    tensors: Sequence[Tensor],
    average: bool | None = None,
    name: str | None = None,
    op: ReduceOp | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> int:
    """Start a `grouped_allreduce`; returns one handle, of a tuple."""
    with Operation("allreduce", name, process_set) as operation:
        how = _how(average, op, prescale_factor, postscale_factor)
        return _start(operation, tensors, how, tuple)


def grouped_allreduce_async_(
    tensors: Sequence[Tensor],
    average: bool | None = None,
    name: str | None = None,
    op: ReduceOp | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> int:
    """Start a `grouped_allreduce_`; returns one handle, of a tuple. The tensors must be left alone until then."""
    with Operation("allreduce", name, process_set) as operation:
        how = _how(average, op, prescale_factor, postscale_factor)
        return _start(operation, tensors, how, tuple, in_place=True)


def grouped_allreduce(
    tensors: Sequence[Tensor],
    average: bool | None = None,
    name: str | None = None,
    compression: type[Compressor] = Compression.none,
    op: ReduceOp | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> list[Tensor]:
    """Reduce several tensors together, all or none; see `allreduce`. `Adasum` combines each tensor by itself."""
    with Operation("allreduce", name, process_set) as operation:
        how = _how(average, op, prescale_factor, postscale_factor)
        pairs = [compression.compress(tensor) for tensor in tensors]
        results = _reduce(operation, [compressed for compressed, _ in pairs], how, process_set)
        return [compression.decompress(result, context) for result, (_, context) in zip(results, pairs, strict=True)]


def grouped_allreduce_(
    tensors: Sequence[Tensor],
    average: bool | None = None,
    name: str | None = None,
    op: ReduceOp | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> tuple[Tensor, ...]:
    """Reduce several tensors together in place, all or none; see `allreduce`."""
    with Operation("allreduce", name, process_set) as operation:
        how = _how(average, op, prescale_factor, postscale_factor)
        return _run(operation, tensors, how, tuple, in_place=True)  # type: ignore[no-any-return]


class _How(NamedTuple):
    op: ReduceOp
    prescale: float = 1.0
    postscale: float = 1.0

    @property
    def details(self) -> dict[str, Any]:
        return {"op": self.op.name.lower(), "prescale": self.prescale, "postscale": self.postscale}


def _how(average: bool | None, op: ReduceOp | int | None, prescale_factor: float, postscale_factor: float) -> _How:
    if average is not None:
        if op is not None:
            raise ValueError("The op parameter supersedes average, got both; pass op only")
        # Two functions up is who calls the face.
        warnings.warn("Parameter `average` has been replaced with `op`", DeprecationWarning, stacklevel=3)
        op = Average if average else Sum
    return _How(parse_op(Average if op is None else op), float(prescale_factor), float(postscale_factor))


def _start(
    operation: Operation,
    tensors: Sequence[Tensor],
    how: _How,
    finish: Callable[[list[Any]], Any],
    *,
    in_place: bool = False,
) -> int:
    return operation.start(tensors, finish, in_place=in_place, **how.details)


def _run(
    operation: Operation,
    tensors: Sequence[Tensor],
    how: _How,
    finish: Callable[[list[Any]], Any],
    *,
    in_place: bool = False,
) -> Any:
    return operation.reduce(tensors, finish, in_place=in_place, **how.details)


def _reduce(operation: Operation, tensors: Sequence[Tensor], how: _How, process_set: ProcessSet) -> Sequence[Tensor]:
    def run() -> Sequence[Tensor]:
        return _run(operation, tensors, how, list)  # type: ignore[no-any-return]

    def reduce_again(others: Sequence[Tensor], other_name: str, how: _How) -> Sequence[Tensor]:
        with Operation("allreduce", other_name, process_set) as other:
            return _reduce(other, others, how, process_set)

    def run_linear() -> tuple[Sequence[Tensor], PullBack]:
        return run(), lambda gradients, other_name: reduce_again(gradients, other_name, how)

    if how.op in (Average, Sum, Adasum):
        return carry_gradients(operation, tensors, run_linear)
    return carry_nonlinear_gradients(
        operation,
        tensors,
        run,
        lambda others, other_name, op: reduce_again(others, other_name, _How(op)),
        op=how.op,
        prescale=how.prescale,
        postscale=how.postscale,
    )
