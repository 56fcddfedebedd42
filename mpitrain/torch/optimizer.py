"""`DistributedOptimizer`: any torch optimizer, with gradients that are averaged over all ranks."""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch

from mpitrain.collectives import Communicator
from mpitrain.memory import ReduceOp, parse_op
from mpitrain.torch.adasum import combined_changes
from mpitrain.torch.arguments import Reduction, check_passes, groups_of_arguments, names_of
from mpitrain.torch.compression import Compression, Compressor
from mpitrain.torch.observation import recorded
from mpitrain.torch.passes import BackwardPasses
from mpitrain.torch.reducer import GradientReducer
from mpitrain.torch.reductions import Average
from mpitrain.torch.world import ProcessSet, communicator, global_process_set, is_initialized, negotiator_of

__all__ = ["DistributedOptimizer"]

Tensor = torch.Tensor


class _Distributed(torch.optim.Optimizer):
    """What is mixed into the class of the wrapped optimizer."""

    _reduction: Reduction
    _passes: int
    _name_of: dict[Tensor, str]
    _local: set[Tensor]
    _reducer: BackwardPasses | None
    _group_ref: Callable[[], Communicator | None]
    _is_synchronized: bool
    _should_synchronize: bool

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Wait for the averaged gradients, then step as the wrapped optimizer does.

        Args:
            closure: Evaluates the model anew and returns the loss; its gradients are averaged each time.
        """
        if self._should_synchronize:
            if self._is_synchronized and self._current_reducer() is not None:
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
            with recorded("optimizer step"):
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
            HorovodInternalError: Ranks have different parameters (in the first step), or could not exchange messages;
                on every rank.
            NotInitializedError: After `shutdown`.
        """
        reducer = self._current_reducer()
        if reducer is not None:
            reducer.synchronize()
            parameters = self._reduced_parameters()
            if not reducer.has_all(parameters):
                # Parameter groups were added, or parameters unfrozen.
                reducer.extend(parameters)
            if self._reduction.scale_local and not self._is_synchronized:
                self._scale_local_gradients()
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
        self._refuse_in_flight("zero_grad() was called")
        if is_initialized():
            self._current_reducer()
        self._is_synchronized = False
        super().zero_grad(set_to_none)

    def set_backward_passes_per_step(self, passes: int) -> None:
        """Change how many backward passes make up a step; between steps, the same on every rank.

        Raises:
            ValueError: Below 1.
        """
        check_passes(passes)
        self._passes = passes
        if self._reducer is not None:
            self._reducer.expect(passes)

    def register_local_var(self, param: Tensor) -> None:
        """Leave the gradient of a parameter alone: it is of this rank only, and so is the parameter.

        On every rank, between steps. The other ranks are told with the next step.

        Args:
            param: One of the optimizer's. Unless `scale_local_gradients=False`, its gradient is divided by the number
                of ranks, which makes it part of an average like those of the other parameters.

        Raises:
            ValueError: No parameter of the optimizer.
            AssertionError: Between a backward pass and the end of its step.
        """
        if not any(param is mine for group in self.param_groups for mine in group["params"]):
            raise ValueError(
                f"register_local_var: must be a parameter of the optimizer, got one of shape {list(param.shape)}; "
                "pass it to the optimizer, too"
            )
        self._refuse_in_flight("register_local_var() was called")
        self._local.add(param)
        if self._reducer is not None:
            self._reducer.give_up([param])
            self._group_ref = _no_group

    def _refuse_in_flight(self, call: str) -> None:
        if self._reducer is not None and self._reducer.is_in_flight:
            raise AssertionError(
                f"optimizer.{call} after loss.backward() but before optimizer.step() or "
                "optimizer.synchronize(). This is prohibited as it can cause a race condition."
            )

    def _current_reducer(self) -> BackwardPasses | None:
        """Return what reduces the gradients among the ranks there are now; None if this is the only one."""
        process_set = self._reduction.process_set
        if process_set.process_set_id is not None and not process_set.included():
            return None
        group = negotiator_of(process_set, "DistributedOptimizer").group
        if self._group_ref() is not group:
            # At first, and after another shutdown and init.
            self._group_ref = weakref.ref(group)
            self._reducer = None
            if group.size > 1:
                self._reducer = self._make_reducer(group)
        return self._reducer

    def _make_reducer(self, group: Communicator) -> BackwardPasses:
        return GradientReducer(self._reduced_parameters(), group, self._reduction, self._passes)

    def _reduced_parameters(self) -> list[tuple[str, Tensor]]:
        """Return (name, parameter) of the parameters that have gradients, which are reduced."""
        return [
            (self._name_of.get(param, f"allreduce.noname.{index}.{position}"), param)
            for index, group in enumerate(self.param_groups)
            for position, param in enumerate(group["params"])
            if param.requires_grad and param not in self._local
        ]

    def _scale_local_gradients(self) -> None:
        group = self._group_ref()
        for param in self._local:
            if param.grad is not None and group is not None:
                param.grad = param.grad.detach().div_(group.size)


class _DistributedAdasum(_Distributed):
    """The same for Adasum, which combines what each rank's step with its own gradients has changed."""

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step with the gradients of this rank as the wrapped optimizer does, then combine the changes of all ranks."""
        if self._current_reducer() is None:
            return super().step(closure)
        with combined_changes(self._reduced_parameters(), self._reduction):
            return super().step(closure)

    step.hooked = True  # type: ignore[attr-defined]

    def _make_reducer(self, group: Communicator) -> BackwardPasses:
        del group
        return BackwardPasses(self._reduced_parameters(), self._passes)


def DistributedOptimizer(  # noqa: N802  (Horovod's name)
    optimizer: torch.optim.Optimizer,
    named_parameters: Iterable[tuple[str, Tensor]] | None = None,
    compression: type[Compressor] = Compression.none,
    backward_passes_per_step: int = 1,
    op: ReduceOp = Average,
    gradient_predivide_factor: float = 1.0,
    num_groups: int = 0,
    groups: int | Sequence[Sequence[Tensor]] | None = None,
    sparse_as_dense: bool = False,
    process_set: ProcessSet = global_process_set,
    scale_local_gradients: bool = True,
) -> Any:
    """Wrap an optimizer so that it steps with gradients reduced over all ranks.

    The result is an instance of the optimizer's own class, with its parameter groups and its state. Communication runs
    while the backward pass does, from the second step on. Every rank must make its steps; those of several optimizers
    in the same order at first. After `shutdown` and `init` it goes on with the ranks there are then.

    Args:
        optimizer: Any `torch.optim.Optimizer`.
        named_parameters: Names for messages; all parameters of the optimizer if given.
        compression: `Compression.none`, `.fp16` or `.bf16`: how floating-point gradients travel. Or a class with static
            methods `compress(tensor)`, which returns a tensor and a context, and `decompress(tensor, context)`; its
            gradients travel one by one.
        backward_passes_per_step: Backward passes whose gradients are summed locally before they are reduced.
        op: `Average`, `Sum`, `Min`, `Max` or `Product` of the gradients; or `Adasum`: each rank steps with its own
            gradients, and the changes that this makes to each parameter are combined, also where the optimizer keeps a
            state of its own on each rank. Gradients are never reduced then, so `synchronize` does not wait.
        gradient_predivide_factor: Part of the division of an average that is done before the sum: gradients are
            multiplied by 1/factor before, and by factor/size after it.
        num_groups: Older spelling of `groups`.
        groups: Gradients that are reduced together when all of a group have come: lists of parameters, or a number of
            groups into which the parameters are cut in their order. The default makes groups of a useful size.
        sparse_as_dense: Reduce sparse gradients as dense ones, which is faster for those that are not very sparse;
            else their entries are gathered. They are sparse again afterwards.
        process_set: Whose ranks take part; on other ranks the optimizer stays what it is.
        scale_local_gradients: See `register_local_var` of the optimizer.

    Raises:
        NotInitializedError: Before `init`.
        ValueError: Names that are missing, repeated or no pairs, or an argument out of range.
    """
    communicator()
    check_passes(backward_passes_per_step)
    op = parse_op(op)
    if isinstance(optimizer, _Distributed):
        raise ValueError(f"optimizer: is distributed already, got {optimizer!r}; wrap the original one")  # noqa: TRY004
    reduction = Reduction(
        op=op,
        process_set=process_set,
        compression=compression,
        predivide=gradient_predivide_factor,
        groups=groups_of_arguments(groups, num_groups),
        sparse_as_dense=sparse_as_dense,
        scale_local=scale_local_gradients,
    )
    state = {
        "_reduction": reduction,
        "_passes": backward_passes_per_step,
        "_name_of": names_of(optimizer, named_parameters),
        "_local": set(),
        "_reducer": None,
        "_group_ref": _no_group,
        "_is_synchronized": False,
        "_should_synchronize": True,
    }
    original = type(optimizer)
    mixin = _DistributedAdasum if op is ReduceOp.ADASUM else _Distributed
    made: Any = object.__new__(type(original.__name__, (mixin, original), {"__module__": original.__module__}))
    # A learning rate scheduler puts a step of its own into the original, which would go past this one's.
    kept = {name: value for name, value in vars(optimizer).items() if name != "step"}
    vars(made).update(kept, **state)
    made._current_reducer()  # noqa: SLF001  (its hooks are to see the first backward pass)
    return made


def _no_group() -> None:
    return None
