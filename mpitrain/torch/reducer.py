"""Averages gradients over all ranks while the backward pass still runs.

A hook on each parameter gets its fresh gradient while that is still in the cache, and copies it into its place in a
bucket, scaled and cast in the same pass. A bucket that is full is all-reduced at once, in the background, in memory
that the ranks of a node share. Buckets start in one order on all ranks, whatever the order in which they fill, so
nothing needs to be negotiated.

Until a step's buckets are synchronized, `param.grad` of a gradient in flight is None: nobody can read or change half
a sum. Then it is a view of the bucket; no copy is made.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import Any

import numpy as np
import torch

from mpitrain.collectives import Communicator, Handle, PersistentPlan
from mpitrain.errors import CollectiveMismatchError, NotInitializedError
from mpitrain.memory import SharedArray, as_dtype
from mpitrain.torch.buckets import bucket_layout

__all__ = ["GradientReducer", "Scaling"]

Tensor = torch.Tensor

# Buckets begin on cache lines.
_LINE_NBYTES = 64


@dataclasses.dataclass(frozen=True, slots=True)
class Scaling:
    """How gradients are reduced.

    Attributes:
        op: Name of the reduction, "sum" for averages, too.
        before: Factor that a gradient is multiplied by on its way into the bucket.
        after: Factor for the reduced bucket.
        wire_dtype: Dtype in which floating-point gradients travel; None for their own.
    """

    op: str = "sum"
    before: float = 1.0
    after: float = 1.0
    wire_dtype: torch.dtype | None = None


class _Slot:
    """The place of one parameter's gradient."""

    __slots__ = ("bucket", "has_arrived", "name", "param", "passes_left", "position", "view")

    def __init__(self, position: int, name: str, param: Tensor) -> None:
        self.position = position
        self.name = name
        self.param = param
        self.passes_left = 0
        self.has_arrived = False
        # Position among the buckets; the bucket itself would make a cycle, which dies late.
        self.bucket = -1
        self.view: Tensor


class _Bucket:
    """Gradients that are reduced together."""

    __slots__ = ("buffer", "handle", "missing", "plan", "slots")

    def __init__(self, position: int, slots: list[_Slot], buffer: Tensor, plan: PersistentPlan) -> None:
        self.slots = slots
        self.buffer = buffer
        self.plan = plan
        self.missing = len(slots)
        self.handle: Handle[Any] | None = None
        offset = 0
        for slot in slots:
            count = slot.param.numel()
            slot.bucket = position
            slot.view = buffer[offset : offset + count].view(slot.param.shape)
            offset += count


class GradientReducer:
    """Reduces the gradients of some parameters on a communicator of its own.

    A parameter belongs to the reducer that was made for it last; one that loses a parameter so is retired as a whole.

    Args:
        parameters: (name, parameter) pairs, the same on every rank.
        group: Its ranks take part; a duplicate is used.
        scaling: Same on every rank.
        passes: Backward passes per step, same on every rank; gradients of the earlier ones are summed locally.

    Raises:
        CollectiveMismatchError: Ranks have different parameters, scaling or passes; on every rank.
    """

    def __init__(
        self, parameters: Sequence[tuple[str, Tensor]], group: Communicator, scaling: Scaling, passes: int
    ) -> None:
        self._group = group
        self._scaling = scaling
        self.passes = passes
        # All ranks agree once, here, so that no operation needs a check of its own.
        self._check_same(parameters)
        self._comm = group.duplicate(group.settings.replace(check=False))
        self._ended = ""
        self._slots: list[_Slot] = []
        self._slot_of: dict[Tensor, _Slot] = {}
        self._hooks: list[Any] = []
        # Positions in the order of buckets, and those whose gradients have come in a pass that teaches it.
        self._order: list[int] = []
        self._arrivals: list[int] | None = []
        self._asked: Handle[Any] | None = None
        self._buckets: list[_Bucket] = []
        self._memory: SharedArray | None = None
        self._next = 0
        group.before_leaving(self.leave)
        # Backward passes usually make gradients in the opposite order of the parameters; the first one will tell.
        self._build(list(reversed(self._add(parameters))))
        _alive.add(self)

    @property
    def is_in_flight(self) -> bool:
        """Whether a gradient has been taken that is not synchronized yet."""
        return any(slot.has_arrived for slot in self._slots)

    def reset(self) -> None:
        """Expect `passes` backward passes from now on."""
        for slot in self._slots:
            slot.passes_left = self.passes

    def synchronize(self) -> None:
        """Wait until all gradients are reduced; afterwards every parameter has its gradient.

        A parameter without a gradient on this rank takes part with zeros. Every rank must call.

        Raises:
            CommError: The ranks could not exchange messages.
            NotInitializedError, RuntimeError: The reducer has ended.
        """
        for bucket in self._buckets:
            for slot in bucket.slots:
                if not slot.has_arrived:
                    self._take(slot)
        self._launch()
        for bucket in self._buckets:
            assert bucket.handle is not None
            bucket.handle.wait()
            self._hand_out(bucket)
        self._next = 0
        self.reset()
        # Asked in one step and answered by the next, so that no step waits for what another rank has not started.
        if self._asked is not None:
            self._learn_order(self._asked)
        elif self._arrivals is not None:
            self._ask_order(self._arrivals)

    def extend(self, parameters: Sequence[tuple[str, Tensor]]) -> None:
        """Take on those parameters that are new, and reduce the gradients that they have by now.

        Every rank must call, after `synchronize`, if any of the parameters is new.
        """
        new = [pair for pair in parameters if pair[1] not in self._slot_of]
        self._check_same(new)
        added = self._add(new)
        order = [*self._order, *reversed(added)]
        if self._asked is not None:
            self._asked.wait()
        self._asked = self._arrivals = None
        self._build(list(reversed(added)))
        self.synchronize()
        self._build(order)
        self._arrivals = []

    def has_all(self, parameters: Sequence[tuple[str, Tensor]]) -> bool:
        """Whether none of the parameters is new."""
        return all(param in self._slot_of for _, param in parameters)

    def leave(self, reason: str) -> None:
        """Tell the others that no more gradients come from this rank."""
        if not self._ended:
            self._ended = f"this rank {reason}"
            self._comm.leave(reason)

    def give_up(self, params: Sequence[Tensor]) -> None:
        """Retire if one of the parameters is among its own: two reducers would take the gradient from each other."""
        if any(param in self._slot_of for param in params):
            self._ended = "its parameters were given to another one"
            for hook in self._hooks:
                hook.remove()
            _alive.discard(self)

    def _check_alive(self) -> None:
        if self._ended:
            error = NotInitializedError if self._ended.startswith("this rank") else RuntimeError
            raise error(f"optimizer: cannot be used any more, {self._ended}; wrap the optimizer again")

    def _add(self, parameters: Sequence[tuple[str, Tensor]]) -> list[int]:
        """Make slots for parameters, and return their positions."""
        slots = [
            _Slot(position, name, param) for position, (name, param) in enumerate(parameters, start=len(self._slots))
        ]
        for other in list(_alive):
            if other is not self:
                other.give_up([slot.param for slot in slots])
        # The hooks do not keep the reducer alive: a parameter whose optimizer is gone is one like any other.
        on_gradient = _weak_hook(weakref.WeakMethod(self._on_gradient))
        for slot in slots:
            self._slots.append(slot)
            self._slot_of[slot.param] = slot
            hook = slot.param.register_post_accumulate_grad_hook(on_gradient)  # type: ignore[no-untyped-call]
            self._hooks.append(hook)
        return [slot.position for slot in slots]

    def _check_same(self, parameters: Sequence[tuple[str, Tensor]]) -> None:
        mine = [f"{self._scaling}, {self.passes} backward passes per step"]
        mine += [f"{name}: {param.dtype} {list(param.shape)}" for name, param in parameters]
        everybodys = self._group.allgather_obj(mine)
        for rank, others in enumerate(everybodys):
            if others != everybodys[0]:
                pairs = zip_longest(everybodys[0], others, fillvalue="nothing")
                here, there = next(pair for pair in pairs if pair[0] != pair[1])
                raise CollectiveMismatchError(
                    "optimizer: ranks have different parameters or arguments; wrap the same on every rank\n"
                    f"  rank 0: {here}\n  rank {rank}: {there}"
                )

    def _build(self, order: list[int]) -> None:
        """Lay out the buckets for gradients that come in this order."""
        settings = self._comm.settings
        dtypes = [self._wire_dtype(slot.param) for slot in self._slots]
        sizes = [(slot.param.numel() * dtype.itemsize, dtype) for slot, dtype in zip(self._slots, dtypes, strict=True)]
        layout = bucket_layout(
            sizes,
            order,
            bucket_nbytes=settings.bucket_nbytes,
            first_bucket_nbytes=settings.first_bucket_nbytes,
        )
        self._order = order
        self._buckets = []
        counts = [sum(self._slots[position].param.numel() for position in members) for members in layout]
        nbytes_of = [
            _aligned(count * dtypes[members[0]].itemsize) for members, count in zip(layout, counts, strict=True)
        ]
        memory = self._memory_of(sum(nbytes_of))
        offset = 0
        for members, count, nbytes in zip(layout, counts, nbytes_of, strict=True):
            array = memory.part(as_dtype(dtypes[members[0]]), offset, count)
            offset += nbytes
            plan = self._comm.plan_allreduce_(array, op=self._scaling.op)
            slots = [self._slots[position] for position in members]
            self._buckets.append(_Bucket(len(self._buckets), slots, array.tensor(), plan))
        self._next = 0
        self.reset()

    def _memory_of(self, nbytes: int) -> SharedArray:
        """Return the memory for all buckets, which the node shares; the same as before as long as it suffices."""
        if self._memory is not None and nbytes <= self._memory.flat.nbytes:
            # Gradients of the step that ends here lie where the next buckets will be.
            for slot in self._slots:
                if slot.param.grad is not None:
                    slot.param.grad = slot.param.grad.clone()
        else:
            # The order of the parameters changes how they fit into buckets, but each adds less than a line.
            self._memory = self._group.allocate(nbytes + len(self._slots) * _LINE_NBYTES, "uint8")
        return self._memory

    def _wire_dtype(self, param: Tensor) -> torch.dtype:
        wire_dtype = self._scaling.wire_dtype
        return wire_dtype if wire_dtype is not None and param.dtype.is_floating_point else param.dtype

    def _on_gradient(self, param: Tensor) -> None:
        slot = self._slot_of[param]
        if slot.has_arrived:
            raise AssertionError(
                "Gradients were computed more than backward_passes_per_step times before call to step(). "
                f"Increase backward_passes_per_step to accumulate gradients locally (parameter {slot.name!r})."
            )
        self._check_alive()
        slot.passes_left -= 1
        if slot.passes_left:
            return
        if self._arrivals is not None:
            self._arrivals.append(slot.position)
        self._take(slot)
        self._launch()

    def _take(self, slot: _Slot) -> None:
        """Move a parameter's gradient into its bucket."""
        # Of a backward pass that creates a graph, the value is taken.
        grad = None if slot.param.grad is None else slot.param.grad.detach()
        if grad is None:
            slot.view.zero_()
        elif grad.is_sparse:
            raise TypeError(
                f"gradient of {slot.name!r}: must be dense, got {grad.layout}; make the layer with sparse=False"
            )
        elif self._scaling.before == 1.0:
            slot.view.copy_(grad)
        else:
            torch.mul(grad, self._scaling.before, out=slot.view)
        slot.param.grad = None
        slot.has_arrived = True
        self._buckets[slot.bucket].missing -= 1

    def _launch(self) -> None:
        """Start the buckets that are full and whose turn it is."""
        self._check_alive()
        while self._next < len(self._buckets) and not self._buckets[self._next].missing:
            bucket = self._buckets[self._next]
            bucket.handle = bucket.plan.start()
            self._next += 1

    def _hand_out(self, bucket: _Bucket) -> None:
        if self._scaling.after != 1.0:
            bucket.buffer.mul_(self._scaling.after)
        for slot in bucket.slots:
            is_own_dtype = bucket.buffer.dtype == slot.param.dtype
            # One that was frozen has no gradient, or the optimizer would go on changing it.
            if slot.param.requires_grad:
                slot.param.grad = slot.view if is_own_dtype else slot.view.to(slot.param.dtype)
            slot.has_arrived = False
        bucket.missing = len(bucket.slots)
        bucket.handle = None

    def _ask_order(self, arrivals: list[int]) -> None:
        """Start telling all ranks the order of rank 0's first backward pass."""
        order = np.full(len(self._slots), -1, np.int64)
        order[: len(arrivals)] = arrivals
        self._asked = self._comm.broadcast_async_(order)
        self._arrivals = None

    def _learn_order(self, asked: Handle[Any]) -> None:
        """Lay the buckets out anew in the order that all ranks have been told."""
        arrivals = [int(position) for position in asked.wait() if position >= 0]
        self._asked = None
        if not arrivals:
            self._arrivals = []  # a step without a backward pass teaches nothing
            return
        unused = set(self._order) - set(arrivals)
        self._build(arrivals + sorted(unused, reverse=True))


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _LINE_NBYTES) * _LINE_NBYTES


# The reducers that parameters belong to.
_alive: weakref.WeakSet[GradientReducer] = weakref.WeakSet()


def _weak_hook(method: Callable[[], Callable[[Tensor], None] | None]) -> Callable[[Tensor], None]:
    def on_gradient(param: Tensor) -> None:
        if (alive := method()) is not None:
            alive(param)

    return on_gradient
