"""`DistributedOptimizer`: any torch optimizer, with gradients that are averaged over all ranks."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from mpitrain.memory import ReduceOp
from mpitrain.torch.compression import Compression, Compressor
from mpitrain.torch.operations import Average
from mpitrain.torch.reducer import GradientReducer, Scaling
from mpitrain.torch.world import ProcessSet, global_process_set, negotiator_of, world

__all__ = ["DistributedOptimizer"]


class _Distributed(torch.optim.Optimizer):
    """What is mixed into the class of the wrapped optimizer."""

    _reducer: GradientReducer | None
    _is_synchronized: bool
    _should_synchronize: bool

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Wait for the averaged gradients, then step as the wrapped optimizer does.

        Args:
            closure: Evaluates the model anew and returns the loss; its gradients are averaged each time.
        """
        if self._should_synchronize:
            if self._is_synchronized:
                warnings.warn(
                    "optimizer.step() called without optimizer.skip_synchronize() context after "
                    "optimizer.synchronize(). This can cause training slowdown. You may want to consider using "
                    "optimizer.skip_synchronize() context if you use optimizer.synchronize() in your code.",
                    stacklevel=2,
                )
            if closure is None:
                self.synchronize()
            else:
                closure = self._synchronized(closure)
        self._is_synchronized = False
        return super().step(closure)

    def _synchronized(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        def evaluate() -> Any:
            # Optimizers call closures with gradients switched off or on, as they please.
            with torch.enable_grad():
                loss = closure()
            self.synchronize()
            return loss

        return evaluate

    def synchronize(self) -> None:
        """Wait until all gradients are averaged; afterwards they may be read and changed, clipped for example.

        Raises:
            HorovodInternalError: The ranks could not exchange messages.
        """
        if self._reducer is not None:
            self._reducer.synchronize()
        self._is_synchronized = True

    @contextlib.contextmanager
    def skip_synchronize(self) -> Iterator[None]:
        """Let `step` use the gradients as they are, because `synchronize` was called before.

            loss.backward()
            optimizer.synchronize()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            with optimizer.skip_synchronize():
                optimizer.step()
        """
        self._should_synchronize = False
        try:
            yield
        finally:
            self._should_synchronize = True

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients.

        Raises:
            AssertionError: Gradients of a backward pass have been taken and neither `step` nor `synchronize` was called.
        """
        if self._reducer is not None and self._reducer.is_in_flight:
            raise AssertionError(
                "optimizer.zero_grad() was called after loss.backward() but before optimizer.step() or "
                "optimizer.synchronize(). This is prohibited as it can cause a race condition."
            )
        super().zero_grad(set_to_none)

    def set_backward_passes_per_step(self, passes: int) -> None:
        """Change how many backward passes make up a step; between steps, the same on every rank.

        Raises:
            ValueError: Below 1.
        """
        _check_passes(passes)
        if self._reducer is not None:
            self._reducer.passes = passes
            self._reducer.reset()


def DistributedOptimizer(  # noqa: N802  (Horovod's name)
    optimizer: torch.optim.Optimizer,
    named_parameters: Iterable[tuple[str, torch.Tensor]] | None = None,
    compression: type[Compressor] = Compression.none,
    backward_passes_per_step: int = 1,
    op: ReduceOp = Average,
    gradient_predivide_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> Any:
    """Wrap an optimizer so that it steps with gradients reduced over all ranks.

    Every rank must call, in the same order if there are several optimizers. The result is an instance of the optimizer's
    own class, with its parameter groups and its state. Communication runs while the backward pass does.

    Args:
        optimizer: Any `torch.optim.Optimizer`.
        named_parameters: Names for messages; all parameters of the optimizer if given.
        compression: `Compression.none`, `.fp16` or `.bf16`: how floating-point gradients travel.
        backward_passes_per_step: Backward passes whose gradients are summed locally before they are reduced.
        op: `Average`, `Sum`, `Min`, `Max` or `Product`.
        gradient_predivide_factor: Part of the division of an average that is done before the sum: gradients are
            multiplied by 1/factor before, and by factor/size after it.
        process_set: Whose ranks take part; on other ranks the optimizer stays what it is.

    Raises:
        NotInitializedError: Before `init`.
        ValueError: Names that are missing, repeated or no pairs, or an argument out of range.
        CollectiveMismatchError: Ranks have different parameters; on every rank.
    """
    world()
    _check_passes(backward_passes_per_step)
    op = ReduceOp(op)
    if gradient_predivide_factor != 1.0 and op is not Average:
        raise ValueError("gradient_predivide_factor not supported with op != Average, got both; leave one out")
    if op is ReduceOp.ADASUM:
        raise ValueError("op: adasum is not elementwise and not available here, got Adasum; use Average or Sum")
    parameters = _named(optimizer, named_parameters)
    original = type(optimizer)
    wrapped: Any = object.__new__(type(original.__name__, (_Distributed, original), {"__module__": original.__module__}))
    wrapped.__dict__.update(optimizer.__dict__)
    wrapped._is_synchronized = False
    wrapped._should_synchronize = True
    wrapped._reducer = None
    if process_set.process_set_id is None or process_set.included():
        comm = negotiator_of(process_set, "DistributedOptimizer").comm
        if comm.size > 1:
            scaling = _scaling(op, comm.size, gradient_predivide_factor, compression)
            # All ranks agree once, when the reducer is made, so its operations need no further checks.
            own = comm.duplicate(comm.settings.replace(check=False))
            wrapped._reducer = GradientReducer(parameters, own, scaling, backward_passes_per_step)
    return wrapped


def _scaling(op: ReduceOp, size: int, predivide: float, compression: type[Compressor]) -> Scaling:
    wire_dtype = compression.wire_dtype
    if op is not Average:
        return Scaling(op.name.lower(), wire_dtype=wire_dtype)
    if predivide == 1.0:
        # Dividing before the sum keeps small dtypes from overflowing, and costs nothing on the way into the bucket.
        return Scaling(before=1.0 / size, wire_dtype=wire_dtype)
    return Scaling(before=1.0 / predivide, after=predivide / size, wire_dtype=wire_dtype)


def _named(
    optimizer: torch.optim.Optimizer, named_parameters: Iterable[tuple[str, torch.Tensor]] | None
) -> list[tuple[str, torch.Tensor]]:
    """Return (name, parameter) of the optimizer's parameters that have gradients."""
    groups = optimizer.param_groups
    if named_parameters is None:
        pairs = [
            (f"allreduce.noname.{index}.{position}", param)
            for index, group in enumerate(groups)
            for position, param in enumerate(group["params"])
        ]
    else:
        pairs = list(named_parameters)
        if not all(isinstance(pair, tuple) and len(pair) == 2 for pair in pairs):
            raise ValueError(
                "named_parameters should be a sequence of tuples (name, parameter), usually produced by "
                f"model.named_parameters(), got {pairs[:1]}"
            )
    names = [name for name, _ in pairs]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"Parameter names in named_parameters must be unique. Found duplicates: {', '.join(repeated)}")
    name_of = {param: name for name, param in pairs}
    params = [param for group in groups for param in group["params"]]
    unnamed = [param for param in params if param not in name_of]
    if unnamed:
        raise ValueError(
            "named_parameters was specified, but one or more model parameters were not named: "
            f"{len(unnamed)} of {len(params)}, the first of shape {list(unnamed[0].shape)}; name all or none"
        )
    return [(name_of[param], param) for param in params if param.requires_grad]


def _check_passes(passes: int) -> None:
    if passes < 1:
        raise ValueError(f"backward_passes_per_step: must be at least 1, got {passes}; 1 steps after every pass")
