"""Averages gradients over all ranks while the backward pass still runs.

A hook on each parameter gets its fresh gradient while that is still in the cache, and copies it into its place in a
bucket, scaled and cast in the same pass. A bucket that is full is all-reduced at once, in the background, in memory
that the ranks of a node share. Buckets start in one order on all ranks, whatever the order in which they fill, so
nothing needs to be negotiated.

Where parameters lie on a device, so do their buckets, and a bucket is filled at once; see `device_buckets`.

From then on, `param.grad` is the gradient's place in the bucket; no further copy is made. Its contents are in flux
until the step's gradients are synchronized.

The first step is different: its backward pass shows in which order gradients come and which are sparse. The ranks
then agree, lay out the buckets, and reduce all gradients at once. Nothing is communicated before.

A step that ends half way on one rank, by an error or an interrupt, must not meet the next one on the others: that rank
gives up averaging, on all ranks.

A rank that has joined stands in: it takes part in steps without gradients. As steps are not negotiated, it is told of
each one, but only while somebody has joined; see `mpitrain.negotiation.joining`.
"""

from __future__ import annotations

import time
import warnings
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import zip_longest

import torch

from mpitrain.collectives import Communicator
from mpitrain.errors import CollectiveError, CollectiveMismatchError, CommRevokedError
from mpitrain.negotiation import Negotiator
from mpitrain.torch.arguments import Reduction
from mpitrain.torch.bucket_memory import BucketMemory
from mpitrain.torch.named_gradients import NamedGradients
from mpitrain.torch.observation import BackwardSpan
from mpitrain.torch.passes import BackwardPasses
from mpitrain.torch.slots import Bucket, Slot, set_aside
from mpitrain.torch.world import negotiator_of

__all__ = ["GradientReducer"]

Tensor = torch.Tensor


class GradientReducer(BackwardPasses):
    """Reduces the gradients of some parameters on a communicator of its own.

    Args:
        parameters: (name, parameter) pairs, the same on every rank.
        group: Its ranks take part; a duplicate is used.
        reduction: Same on every rank.
        passes: Backward passes per step, same on every rank; gradients of the earlier ones are summed locally.
    """

    def __init__(
        self, parameters: Sequence[tuple[str, Tensor]], group: Communicator, reduction: Reduction, passes: int
    ) -> None:
        super().__init__(parameters, passes)
        # An optimizer that is not used any more does not keep the world of its group.
        negotiator = negotiator_of(reduction.process_set, "DistributedOptimizer")
        self._negotiator_ref = weakref.ref(negotiator)
        self._number = negotiator.steps.register(self.stand_in)
        self._reduction = reduction
        self._before, self._after = reduction.factors(group.size)
        self._comm: Communicator | None = None
        self._is_standing_in = False
        # Why nothing is averaged any more.
        self._failure = ""
        self._named = NamedGradients(reduction)
        self._buckets: list[Bucket] = []
        self._next = 0
        self._backward = BackwardSpan()
        self._memory = BucketMemory(reduction)
        # Positions of the slots in the order of the buckets.
        self._order: list[int] = []
        # Those whose gradients have come in a step whose order is to be learned; None once it is known.
        self._arrivals: list[int] | None = []
        group.before_leaving(self.leave)

    @property
    def _negotiator(self) -> Negotiator:
        negotiator = self._negotiator_ref()
        assert negotiator is not None
        return negotiator

    @property
    def _group(self) -> Communicator:
        return self._negotiator.group

    def synchronize(self) -> None:
        """Wait until all gradients are reduced; afterwards every parameter has its gradient.

        A parameter without a gradient on this rank takes part with zeros. Every rank must call.

        Raises:
            CollectiveMismatchError: Ranks have different parameters or arguments; on every rank, in the first step.
            CommError: The ranks could not exchange messages, or a step has failed on one of them, this one or an
                earlier one.
            RuntimeError: The parameters belong to another reducer.
        """
        self.check_alive()
        self._backward.end(self._group.engine.recorder)
        with self._negotiator.steps.entered(self._number):
            self._synchronize()

    def stand_in(self) -> None:
        """Take part in a step of the others with zeros, and keep the gradients of this rank, which has joined."""
        self._is_standing_in = True
        try:
            with set_aside(self._slots):
                self._synchronize()
        finally:
            self._is_standing_in = False

    def _synchronize(self) -> None:
        if self._arrivals is None:
            self._reduce([slot for slot in self._slots if not slot.has_arrived])
        else:
            with self._failing_together():
                is_learned = self._learn(self._arrivals)
            self._reduce(self._slots)
            # A step without a backward pass teaches nothing.
            self._arrivals = None if is_learned else []

    def extend(self, parameters: Sequence[tuple[str, Tensor]]) -> None:
        """Take on those parameters that are new, and reduce the gradients that they have by now.

        Every rank must call, after `synchronize`, if any of the parameters is new.

        Raises:
            RuntimeError: Ranks have joined, which cannot know of new parameters; on all others.
        """
        if self._negotiator.steps.absent:
            raise RuntimeError(
                f"optimizer: cannot take on parameters while ranks {list(self._negotiator.steps.absent)} have joined; "
                "add or unfreeze them in a step that all ranks make"
            )
        with self._failing_together():
            added = self._add([pair for pair in parameters if pair[1] not in self._slot_of])
            self._agree(added, [])
            self._build([slot.position for slot in reversed(added)])
        self._reduce(added)
        # Where the new ones come among the others, the next step will tell.
        self._arrivals = []

    def leave(self, reason: str) -> None:
        """Tell the others that no more gradients come from this rank, and let go of the parameters."""
        self.retire(f"this rank {reason}")
        comm, self._comm = self._comm, None
        self._memory.clear()
        self._buckets.clear()
        if comm is not None:
            comm.leave(reason)

    @contextmanager
    def _failing_together(self) -> Iterator[None]:
        """Let a failure of the body be one on all ranks."""
        if self._failure:
            self.end_step()
            raise CommRevokedError(
                f"optimizer: averages gradients no more, {self._failure}; call shutdown and init to go on"
            )
        try:
            yield
        except CollectiveMismatchError:
            # All ranks know, and nothing was started.
            self.end_step()
            raise
        except BaseException as error:
            # The others may wait in a set-up operation of the group.
            self._group.revoke(f"an optimizer could not lay out its gradients: {type(error).__name__}: {error}")
            self._let_go(error)
            raise

    def _fail(self, slots: Sequence[Slot], error: BaseException) -> None:
        """Let a step that has failed here fail on all ranks; `slots` are those whose gradients it was to take."""
        if not self._is_standing_in:
            self._named.abandon([slot for slot in slots if slot.bucket < 0], error)
        if self._buckets:
            self._let_go(error)
        # What travels by name goes on with the next step.
        self.end_step()

    def _let_go(self, error: BaseException) -> None:
        """Average no more, on any rank; other ranks may still read what lies in the buckets."""
        self._failure = f"as a step has failed with {type(error).__name__}: {error}"
        (self._comm or self._group).revoke(self._failure)
        for slot in self._slots:
            if slot.bucket >= 0 and slot.param.grad is slot.view:
                slot.param.grad = None
        self._buckets, self._next = [], 0
        self._memory.clear()
        self._named.abandon((), error)
        self._named = NamedGradients(self._reduction)
        # From here on gradients stay where they are.
        self._arrivals = []
        self.end_step()

    # What the first step settles

    def _learn(self, arrivals: list[int]) -> bool:
        """Lay out the buckets in the order in which gradients have come; whether any rank had some."""
        orders = self._agree(self._slots, arrivals)
        # Where nothing is known: backward passes usually make gradients in the opposite order of the parameters.
        arrivals = next((order for order in orders if order), [])
        rest = set(range(len(self._slots))) - set(arrivals)
        self._build(arrivals + sorted(rest, reverse=True))
        return bool(arrivals)

    def _agree(self, slots: Sequence[Slot], arrivals: list[int]) -> list[list[int]]:
        """Tell one another about slots: check what must be the same, and join what each has seen.

        Returns:
            The arrivals of each rank.
        """
        facts = [f"{self._reduction.describe(self._group.size)}, {self.passes} backward passes per step"]
        facts += [f"groups of positions {self._reduction.groups_among([slot.param for slot in self._slots])}"]
        facts += [slot.describe() for slot in slots]
        grads = [(slot.position, slot.param.grad) for slot in slots]
        sparse = {position: grad.sparse_dim() for position, grad in grads if grad is not None and grad.is_sparse}
        kinds = [slot.param.device.type for slot in slots]
        everybodys = self._group.allgather_obj((facts, sparse, arrivals, kinds))
        for rank, (others, *_) in enumerate(everybodys):
            if others != everybodys[0][0]:
                pairs = zip_longest(everybodys[0][0], others, fillvalue="nothing")
                here, there = next(pair for pair in pairs if pair[0] != pair[1])
                raise CollectiveMismatchError(
                    "optimizer: ranks have different parameters or arguments; wrap the same on every rank\n"
                    f"  rank 0: {here}\n  rank {rank}: {there}"
                )
        for _, others_sparse, _, _ in everybodys:
            for position, sparse_dim in others_sparse.items():
                self._slots[position].sparse_dim = sparse_dim
        for slot, devices in zip(slots, zip(*(kinds for *_, kinds in everybodys), strict=True), strict=True):
            slot.devices = devices
        return [order for _, _, order, _ in everybodys]

    def _build(self, order: list[int]) -> None:
        """Lay out the buckets for gradients that come in this order."""
        if self._comm is None:
            # All ranks have agreed already, so that no operation needs a check of its own.
            self._comm = self._group.duplicate(self._group.settings.replace(check=False))
            self._comm.while_waiting(self._negotiator.attend)
        self._order = order
        self._buckets, self._next = [], 0
        self._buckets = self._memory.lay_out(self._group, self._comm, self._slots, order)

    # What happens in every step

    def on_complete(self, slot: Slot) -> None:
        """Take the gradient, and start what is full."""
        if self._arrivals is not None:
            self._arrivals.append(slot.position)
            return
        recorder = self._group.engine.recorder
        try:
            if recorder is None:
                self._take(slot)
            else:
                began_ns = time.monotonic_ns()
                self._take(slot)
                self._backward.note_gradient(recorder, slot.name, began_ns)
            self._launch()
        except BaseException as error:
            self._fail(self._slots, error)
            raise

    def _reduce(self, missing: Sequence[Slot]) -> None:
        """Reduce all gradients, of which some have not been taken yet, to the end."""
        try:
            for slot in missing:
                self._take(slot)
            self._launch()
            unchanged = [bucket.finish(self._after) for bucket in self._buckets]
            self._next = 0
        except BaseException as error:
            self._fail(missing, error)
            raise
        try:
            self._named.finish()
        except CollectiveError:
            raise  # all others are handed out
        except BaseException as error:
            self._named.abandon((), error)
            raise
        finally:
            self.end_step()
        if not all(unchanged):
            warnings.warn(
                "Gradients were changed while they were being reduced, so they are not what they should be. "
                "Call optimizer.synchronize() before you change them, and step in optimizer.skip_synchronize().",
                stacklevel=4,
            )

    def _take(self, slot: Slot) -> None:
        if slot.bucket < 0:
            # Named operations know by themselves of ranks that have joined.
            if not self._is_standing_in:
                self._named.start(slot)
        else:
            self._buckets[slot.bucket].take(slot, self._before)

    def _launch(self) -> None:
        """Start the buckets that are full and whose turn it is."""
        while self._next < len(self._buckets) and not self._buckets[self._next].missing:
            self._buckets[self._next].start()
            self._next += 1
