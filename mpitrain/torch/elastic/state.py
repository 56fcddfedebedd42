"""What an elastic job must not lose: committed in memory, restored after a failure, and the same on all ranks."""

from __future__ import annotations

import copy
import queue
from collections.abc import Callable, Iterable
from typing import Any

import torch

from mpitrain.errors import HostsUpdatedInterrupt
from mpitrain.torch.elastic.sampler import ElasticSampler
from mpitrain.torch.functions import (
    allgather_object,
    broadcast_object,
    broadcast_optimizer_state,
    broadcast_parameters,
)
from mpitrain.torch.reductions import Max, allreduce
from mpitrain.torch.world import rank

__all__ = ["ObjectState", "State", "TorchState"]

_REMOVED = 1
_ADDED = 2


class State:
    """What `elastic.run` asks of a state; `save`, `restore` and `sync` are left to classes made from this one.

    Args:
        bcast_object: Returns on every rank the object of rank 0.
        get_rank: Returns this rank.
    """

    def __init__(self, bcast_object: Callable[[Any], Any], get_rank: Callable[[], int]) -> None:
        self._bcast_object = bcast_object
        self._rank = get_rank
        # Notices come from other threads.
        self._host_messages: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._reset_callbacks: list[Callable[[], Any]] = []

    def save(self) -> None:
        """Keep a copy of the state in memory."""
        raise NotImplementedError

    def restore(self) -> None:
        """Go back to the copy that was saved last."""
        raise NotImplementedError

    def sync(self) -> None:
        """Give all ranks the state of rank 0. Every rank must call."""
        raise NotImplementedError

    def reset(self) -> None:
        """Adapt to the ranks that there are now; called after they have been initialised anew."""

    def commit(self) -> None:
        """Save the state, and look whether the ranks are about to change. Every rank must call.

        Saving copies everything: call it as often as an interval of work may be lost.

        Raises:
            HostsUpdatedInterrupt: They are; on every rank.
        """
        self.save()
        self.check_host_updates()

    def check_host_updates(self) -> None:
        """Look whether some rank has been told that the ranks are about to change. Every rank must call.

        Raises:
            HostsUpdatedInterrupt: One has; on every rank.
        """
        told = 0
        while not self._host_messages.empty():
            told |= self._host_messages.get()
        news = torch.tensor([bool(told & _REMOVED), bool(told & _ADDED)], dtype=torch.uint8)
        removed, added = allreduce(news, op=Max, name="elastic.host_updates").tolist()
        if removed or added:
            # Those that stay have been equal so far; those that are new know nothing yet.
            raise HostsUpdatedInterrupt(skip_sync=not added)

    def on_hosts_updated(self, timestamp: float, update_res: int = _REMOVED | _ADDED) -> None:
        """Note that the ranks are about to change; from any thread, on any rank.

        Args:
            timestamp: Not needed; accepted as in Horovod.
            update_res: 1 for ranks that go, 2 for ranks that come, 3 for both.
        """
        del timestamp
        self._host_messages.put(update_res)

    def register_reset_callbacks(self, callbacks: Iterable[Callable[[], Any]]) -> None:
        """Have functions called, in this order, each time after the ranks have been initialised anew."""
        self._reset_callbacks.extend(callbacks)

    def on_reset(self) -> None:
        """Do what is due after the ranks have been initialised anew."""
        self._host_messages = queue.SimpleQueue()
        self.reset()
        for callback in self._reset_callbacks:
            callback()


class ObjectState(State):
    """Objects as attributes: those with a `state_dict` are kept by it, all others are copied and pickled.

    Args:
        bcast_object: See `State`.
        get_rank: See `State`.
        kwargs: Names and values of the attributes.

    Raises:
        ValueError: An attribute has the name of a method.
    """

    def __init__(self, bcast_object: Callable[[Any], Any], get_rank: Callable[[], int], **kwargs: Any) -> None:
        super().__init__(bcast_object, get_rank)
        taken = sorted(name for name in kwargs if hasattr(type(self), name))
        if taken:
            raise ValueError(f"state: an attribute cannot have the name of a method, got {', '.join(taken)}; rename it")
        vars(self).update(kwargs)
        self._names = tuple(kwargs)
        self._saved: dict[str, Any] = {}
        # Not what a class made from this one puts in its place: that class may not be ready yet.
        ObjectState.save(self)

    def save(self) -> None:
        self._saved = {name: copy.deepcopy(self._content(name)) for name in self._names}

    def restore(self) -> None:
        # Copied again: what is restored will be changed, and may be restored once more.
        for name, content in copy.deepcopy(self._saved).items():
            self._set_content(name, content)

    def sync(self) -> None:
        self._sync_pickled(self._names)
        self.save()

    def _sync_pickled(self, names: Iterable[str]) -> None:
        contents = self._bcast_object({name: self._content(name) for name in names})
        if self._rank() != 0:
            for name, content in contents.items():
                self._set_content(name, content)

    def _content(self, name: str) -> Any:
        value = getattr(self, name)
        return value.state_dict() if _is_stateful(value) else value

    def _set_content(self, name: str, content: Any) -> None:
        value = getattr(self, name)
        if _is_stateful(value):
            value.load_state_dict(content)
        else:
            setattr(self, name, content)


class TorchState(ObjectState):
    """A training job: modules, optimizers, samplers, schedulers and any objects that can be pickled.

    Args:
        model: Attribute `model`, if the job has one of this name.
        optimizer: Attribute `optimizer`, likewise.
        kwargs: Names and values of further attributes.
    """

    def __init__(
        self, model: torch.nn.Module | None = None, optimizer: torch.optim.Optimizer | None = None, **kwargs: Any
    ) -> None:
        super().__init__(broadcast_object, rank, model=model, optimizer=optimizer, **kwargs)

    def sync(self) -> None:
        self._sync_pickled([name for name in self._names if not _sync_by_itself(getattr(self, name))])
        self.save()

    def reset(self) -> None:
        for name in self._names:
            if isinstance(sampler := getattr(self, name), ElasticSampler):
                sampler.reset()


def _is_stateful(value: Any) -> bool:
    return callable(getattr(value, "state_dict", None)) and callable(getattr(value, "load_state_dict", None))


def _sync_by_itself(value: Any) -> bool:
    """Give all ranks what rank 0 has, if there is a better way than pickling its state; whether there is."""
    if isinstance(value, torch.nn.Module):
        broadcast_parameters(value.state_dict(), root_rank=0)
    elif isinstance(value, torch.optim.Optimizer):
        broadcast_optimizer_state(value, root_rank=0)
    elif isinstance(value, ElasticSampler):
        _sync_sampler(value)
    else:
        return False
    return True


def _sync_sampler(sampler: ElasticSampler) -> None:
    """Give all ranks the place of rank 0, and what any of them has noted of the same epoch."""
    states = allgather_object(sampler.state_dict())
    recorded = [state.get("processed_indices", ()) for state in states if state["epoch"] == states[0]["epoch"]]
    sampler.load_state_dict(states[0] | {"processed_indices": set().union(*recorded)})
