"""Whole models, optimizers and objects: what ranks must share before and between steps."""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from mpitrain.collectives import try_pickle
from mpitrain.errors import CollectiveMismatchError
from mpitrain.torch.exchanges import root_of
from mpitrain.torch.gathers import only_gathered
from mpitrain.torch.handles import synchronize
from mpitrain.torch.starting import Operation, only_result
from mpitrain.torch.world import ProcessSet, global_process_set

__all__ = ["allgather_object", "broadcast_object", "broadcast_optimizer_state", "broadcast_parameters"]

Tensor = torch.Tensor


def broadcast_parameters(
    params: Mapping[str, Any] | Iterable[tuple[str, Tensor]] | Iterable[Tensor],
    root_rank: int,
    process_set: ProcessSet = global_process_set,
) -> None:
    """Give all ranks the root's parameters, in place.

    Args:
        params: `model.state_dict()`, `model.named_parameters()`, or a list of tensors or (name, tensor) pairs.
            Values that are no tensors are left alone.
        root_rank: Global rank.
        process_set: Whose ranks take part.

    Raises:
        HorovodInternalError: Ranks have different names, shapes or dtypes; on every rank.
        ValueError: Root out of range, or params of another type.
    """
    with _gathering("parameters", process_set):
        root = root_of(root_rank, process_set)
        named = _named_tensors(params)
    _check_names([name for name, _ in named], process_set)
    with Operation("broadcast", "parameters", process_set) as operation:
        synchronize(operation.start([tensor for _, tensor in named], list, root=root, in_place=True))


def _check_names(names: list[str], process_set: ProcessSet) -> None:
    everybodys = allgather_object(names, "parameters", process_set)
    for rank, others in enumerate(everybodys):
        if others != everybodys[0]:
            odd = sorted(set(others) ^ set(everybodys[0])) or "the same in another order"
            raise CollectiveMismatchError(
                f"broadcast_parameters: ranks have different parameters; ranks 0 and {rank} differ in {odd}"
            )


def broadcast_object(
    obj: Any = None, root_rank: int = 0, name: str | None = None, process_set: ProcessSet = global_process_set
) -> Any:
    """Return the root's object on every rank; the root gets its own.

    Ranks of one job trust each other: unpickling runs code that the root chooses.

    Args:
        obj: Anything that pickle takes, or cloudpickle where it is installed; ignored on other ranks than the root.
        root_rank: Global rank.
        name: Same on every rank.
        process_set: Whose ranks take part.

    Raises:
        ValueError: The root's object cannot be pickled, or root out of range; on every rank.
        HorovodInternalError: The ranks could not exchange messages.
    """
    with _broadcasting(name, process_set) as operation:
        root = root_of(root_rank, process_set)
        is_root = operation.negotiator.comm.rank == root
        data, problem = try_pickle(obj) if is_root else (b"", "")
        content = problem.encode() if problem else data
        header = torch.tensor([len(content), bool(problem)], dtype=torch.int64)
        length, has_failed = synchronize(operation.start([header], only_result, root=root)).tolist()
    with Operation("broadcast", _part(name, "bytes"), process_set) as operation:
        payload = _bytes_of(content) if is_root else _bytes(length)
        payload = synchronize(operation.start([payload], only_result, root=root))
    received = payload.numpy().tobytes()
    if has_failed:
        raise ValueError(f"broadcast_object: {received.decode()}; pass an object that pickle accepts")
    return obj if is_root else pickle.loads(received)


def allgather_object(obj: Any, name: str | None = None, process_set: ProcessSet = global_process_set) -> list[Any]:
    """Return the objects of all ranks, in rank order.

    Ranks of one job trust each other: unpickling runs code that a peer chooses.

    Args:
        obj: Anything that pickle takes, or cloudpickle where it is installed.
        name: Same on every rank.
        process_set: Whose ranks take part.

    Raises:
        ValueError: An object cannot be pickled; on every rank.
        HorovodInternalError: The ranks could not exchange messages.
    """
    with _gathering(name, process_set) as operation:
        data, problem = try_pickle(obj)
        content = problem.encode() if problem else data
        header = torch.tensor([[len(content), bool(problem)]])
        headers = synchronize(operation.start([header], only_gathered))
    with Operation("allgather", _part(name, "bytes"), process_set) as operation:
        payload = synchronize(operation.start([_bytes_of(content)], only_gathered))
    everything = payload.numpy().tobytes()
    parts, begin = [], 0
    for length in headers[:, 0].tolist():
        parts.append(everything[begin : begin + length])
        begin += length
    failures = [
        f"rank {rank}: {part.decode()}"
        for rank, (part, has_failed) in enumerate(zip(parts, headers[:, 1].tolist(), strict=True))
        if has_failed
    ]
    if failures:
        raise ValueError(f"allgather_object: {'; '.join(failures)}; pass objects that pickle accepts")
    return [pickle.loads(part) for part in parts]


def broadcast_optimizer_state(
    optimizer: torch.optim.Optimizer,
    root_rank: int,
    model: torch.nn.Module | None = None,
    process_set: ProcessSet = global_process_set,
) -> None:
    """Give all ranks the state of the root's optimizer: hyperparameters, step counts, moments.

    Any optimizer, fresh or used, on any rank; types of the values are kept.

    Args:
        optimizer: Of the same class over the same parameters on every rank.
        root_rank: Global rank.
        model: Not needed; accepted as in Horovod.
        process_set: Whose ranks take part.

    Raises:
        ValueError: The root's state cannot be pickled, or root out of range; on every rank.
        HorovodInternalError: The ranks could not exchange messages.
    """
    del model
    tensors: list[Tensor] = []
    with _broadcasting("optimizer_state", process_set) as operation:
        root = root_of(root_rank, process_set)
        is_root = operation.negotiator.comm.rank == root
        skeleton = _take_tensors(optimizer.state_dict(), tensors) if is_root else None
    skeleton = broadcast_object(skeleton, root_rank, "optimizer_state", process_set)
    with Operation("broadcast", "optimizer_state.tensors", process_set) as operation:
        if not is_root:
            skeleton = _allocate_tensors(skeleton, tensors)
        synchronize(operation.start(tensors, list, root=root, in_place=True))
    if not is_root:
        optimizer.load_state_dict(skeleton)


class _Placeholder:
    """Stands for a tensor in a pickled structure."""

    def __init__(self, tensor: Tensor) -> None:
        self.shape = tuple(tensor.shape)
        self.dtype = tensor.dtype


def _take_tensors(value: Any, tensors: list[Tensor]) -> Any:
    """Copy a structure with placeholders for its tensors, which are collected in order."""
    if isinstance(value, torch.Tensor):
        tensors.append(value)
        return _Placeholder(value)
    return _mapped(value, lambda item: _take_tensors(item, tensors))


def _allocate_tensors(value: Any, tensors: list[Tensor]) -> Any:
    """Copy a structure with new tensors for its placeholders, which are collected in order."""
    if isinstance(value, _Placeholder):
        tensor = torch.empty(value.shape, dtype=value.dtype)
        tensors.append(tensor)
        return tensor
    return _mapped(value, lambda item: _allocate_tensors(item, tensors))


def _mapped(value: Any, function: Any) -> Any:
    if type(value) is dict:
        return {key: function(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(function(item) for item in value)
    return value


def _named_tensors(params: Any) -> list[tuple[str, Tensor]]:
    if isinstance(params, Mapping):
        items = sorted(params.items())
    elif isinstance(params, Iterable) and not isinstance(params, (str, torch.Tensor)):
        items = [item if isinstance(item, tuple) else (str(index), item) for index, item in enumerate(params)]
    else:
        raise ValueError(f"invalid params of type: {type(params)}; pass a state dict or named parameters")  # noqa: TRY004  (Horovod's class)
    return [(name, tensor) for name, tensor in items if isinstance(tensor, torch.Tensor)]


def _gathering(name: str | None, process_set: ProcessSet) -> Operation:
    """Return the first operation of `allgather_object`."""
    return Operation("allgather", _part(name, "sizes"), process_set)


def _broadcasting(name: str | None, process_set: ProcessSet) -> Operation:
    """Return the first operation of `broadcast_object`."""
    return Operation("broadcast", _part(name, "size"), process_set)


def _bytes_of(content: bytes) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8) if content else _bytes(0)


def _bytes(length: int) -> Tensor:
    return torch.empty(length, dtype=torch.uint8)


def _part(name: str | None, part: str) -> str | None:
    return None if name is None else f"{name}.{part}"
