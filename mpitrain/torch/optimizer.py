"""`DistributedOptimizer`: any torch optimizer, with gradients that are averaged over all ranks."""

from __future__ import annotations

import collections
import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch

from mpitrain.memory import ReduceOp, parse_op
from mpitrain.torch.compression import Compression, Compressor
from mpitrain.torch.reducer import GradientReducer, Scaling
from mpitrain.torch.reductions import Average
from mpitrain.torch.world import ProcessSet, communicator, global_process_set, negotiator_of

__all__ = ["DistributedOptimizer"]


class _Distributed(torch.optim.Optimizer):
    """What is mixed into the class of the wrapped optimizer."""

    _reducer: GradientReducer | None
    _name_of: dict[torch.Tensor, str]
    _is_synchronized: bool
    _should_synchronize: bool

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Wait for the averaged gradients, then step as the wrapped optimizer does.

        Args:
            closure: Evaluates the model anew and returns the loss; its gradients are averaged each time.
        """
        if self._should_synchronize:
            if self._is_synchronized and self._reducer is not None:
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
        try:
            return super().step(closure)
        finally:
            self._is_synchronized = False

    # Torch wraps the step of a class for those who hook into it; here the step of the original class has that.
    step.hooked = True  # type: ignore[attr-defined]

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
            parameters = _trained(self, self._name_of)
            if not self._reducer.has_all(parameters):
                # Parameter groups were added, or parameters unfrozen.
                self._reducer.extend(parameters)
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
            AssertionError: Gradients of a backward pass have been taken, and not been waited for since by `step` or
                `synchronize`.
        """
        if self._reducer is not None and self._reducer.is_in_flight:
            raise AssertionError(
                "optimizer.zero_grad() was called after loss.backward() but before optimizer.step() or "
                "optimizer.synchronize(). This is prohibited as it can cause a race condition."
            )
        self._is_synchronized = False
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

    Every rank must call, in the same order if there are several optimizers. The result is an instance of the
    optimizer's own class, with its parameter groups and its state. Communication runs while the backward pass does.

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
    communicator()
    _check_passes(backward_passes_per_step)
    _check_compression(compression)
    op = parse_op(op)
    if isinstance(optimizer, _Distributed):
        raise ValueError(f"optimizer: is distributed already, got {optimizer!r}; wrap the original one")  # noqa: TRY004
    if gradient_predivide_factor != 1.0 and op is not Average:
        raise ValueError(
            "gradient_predivide_factor not supported with op != Average, "
            f"got {gradient_predivide_factor} with {op.name.lower()}; leave one out"
        )
    if op is ReduceOp.ADASUM:
        raise ValueError(
            "op: adasum is not elementwise and not available here, got Adasum; use it in hvd.allreduce, or Average here"
        )
    name_of = _names(optimizer, named_parameters)
    original = type(optimizer)
    made: Any = object.__new__(type(original.__name__, (_Distributed, original), {"__module__": original.__module__}))
    # A learning rate scheduler puts a step of its own into the original, which would go past this one's.
    kept = {name: value for name, value in vars(optimizer).items() if name != "step"}
    state = {
        "_is_synchronized": False,
        "_should_synchronize": True,
        "_reducer": None,
        "_name_of": name_of,
    }
    vars(made).update(kept, **state)
    if process_set.process_set_id is None or process_set.included():
        group = negotiator_of(process_set, "DistributedOptimizer").group
        if group.size > 1:
            scaling = _scaling(op, group.size, gradient_predivide_factor, compression)
            parameters = _trained(made, name_of)
            vars(made)["_reducer"] = GradientReducer(parameters, group, scaling, backward_passes_per_step)
    return made


def _scaling(op: ReduceOp, size: int, predivide: float, compression: type[Compressor]) -> Scaling:
    wire_dtype = compression.wire_dtype
    if op is not Average:
        return Scaling(op.name.lower(), wire_dtype=wire_dtype)
    if predivide == 1.0:
        # Dividing before the sum keeps small dtypes from overflowing, and costs nothing on the way into the bucket.
        return Scaling(before=1.0 / size, wire_dtype=wire_dtype)
    return Scaling(before=1.0 / predivide, after=predivide / size, wire_dtype=wire_dtype)


def _names(
    optimizer: torch.optim.Optimizer, named_parameters: Iterable[tuple[str, torch.Tensor]] | None
) -> dict[torch.Tensor, str]:
    """Return the name of each parameter that has one."""
    if named_parameters is None:
        return {}
    pairs = list(named_parameters)
    if not all(_is_named(pair) for pair in pairs):
        raise ValueError(
            "named_parameters should be a sequence of tuples (name, parameter), usually produced by "
            f"model.named_parameters(), got {pairs[:1]}"
        )
    counts = collections.Counter(name for name, _ in pairs)
    repeated = sorted(name for name, count in counts.items() if count > 1)
    if repeated:
        raise ValueError(f"Parameter names in named_parameters must be unique. Found duplicates: {', '.join(repeated)}")
    name_of = {param: name for name, param in pairs}
    params = [param for group in optimizer.param_groups for param in group["params"]]
    unnamed = [param for param in params if param not in name_of]
    if unnamed:
        raise ValueError(
            "named_parameters was specified, but one or more model parameters were not named: "
            f"{len(unnamed)} of {len(params)}, the first of shape {list(unnamed[0].shape)}; name all or none"
        )
    return name_of


def _trained(optimizer: torch.optim.Optimizer, name_of: Mapping[torch.Tensor, str]) -> list[tuple[str, torch.Tensor]]:
    """Return (name, parameter) of the optimizer's parameters that have gradients."""
    return [
        (name_of.get(param, f"allreduce.noname.{index}.{position}"), param)
        for index, group in enumerate(optimizer.param_groups)
        for position, param in enumerate(group["params"])
        if param.requires_grad
    ]


def _is_named(pair: object) -> bool:
    return isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str)


def _check_compression(compression: type[Compressor]) -> None:
    # Gradients are cast on their way into the buckets; a method that does anything else is never called.
    known = (Compression.none, Compression.fp16, Compression.bf16)
    if compression not in known:
        raise ValueError(
            f"compression: must be Compression.none, .fp16 or .bf16, got {compression!r}; "
            "compress in the loop for now, with the operations"
        )


def _check_passes(passes: int) -> None:
    if passes < 1:
        raise ValueError(f"backward_passes_per_step: must be at least 1, got {passes}; 1 steps after every pass")
