"""Collectives of other libraries on the same buffers: MPI as mpi4py calls it, and torch.distributed on Gloo or NCCL.

Also our own named operations, which are matched by name whatever the order in which ranks start them.

Where a result does not replace what was brought, a rival writes it into an array that is made once, as its users would.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from typing import Any, Protocol

import numpy as np

from mpitrain.bench.operation import Operation
from mpitrain.collectives import Communicator
from mpitrain.errors import UnavailableError
from mpitrain.memory import ReduceOp, flat_view

__all__ = ["RIVALS", "Rival", "process_group", "rivals_named"]

Call = Callable[[], Any]

RIVALS = ("mpi", "gloo", "nccl", "hvd")
"""What our algorithms can be compared with."""

# What every version of Gloo and NCCL knows.
_TORCH_DTYPES = ("uint8", "int8", "int32", "int64", "float16", "bfloat16", "float32", "float64")


class Rival(Protocol):
    """Another library."""

    name: str
    """What tables call it."""

    def call(self, operation: Operation) -> Call | None:
        """Return a function that does what the operation does, once, and returns the result.

        None where the library lacks the dtype, the reduction or the kind of memory.
        """


class _MPI:
    name = "MPI"

    def __init__(self) -> None:
        from mpi4py import MPI

        self._comm = MPI.COMM_WORLD.Dup()
        self._ops = {
            ReduceOp.SUM: MPI.SUM,
            ReduceOp.MIN: MPI.MIN,
            ReduceOp.MAX: MPI.MAX,
            ReduceOp.PRODUCT: MPI.PROD,
        }
        self._in_place = MPI.IN_PLACE

    def call(self, operation: Operation) -> Call | None:
        dtype, use = operation.dtype, operation.use
        if use.memory == "device" or dtype.kind == "bool" or dtype.name in ("float16", "bfloat16"):
            return None
        if operation.op not in self._ops:
            return None
        comm, op = self._comm, self._ops[operation.op]
        data = flat_view(operation.array).data
        if use.collective == "broadcast":
            return _returning(data, lambda: comm.Bcast(data, 0))
        if use.collective == "allreduce" and use.in_place:
            return _returning(data, lambda: comm.Allreduce(self._in_place, data, op))
        out = np.empty(_result_count(operation), data.dtype)
        calls: dict[str, Call] = {
            "allreduce": lambda: comm.Allreduce(data, out, op),
            "reduce_scatter": lambda: comm.Reduce_scatter_block(data, out, op),
            "allgather": lambda: comm.Allgather(data, out),
            "alltoall": lambda: comm.Alltoall(data, out),
        }
        return _returning(out, calls[use.collective])


class _Torch:
    """torch.distributed, whose process group has to exist for as long as this is used."""

    def __init__(self, name: str) -> None:
        import torch.distributed as dist

        self.name = name
        self._is_nccl = name == "NCCL"
        self._group = dist.new_group(backend="nccl") if self._is_nccl else dist.group.WORLD

    def call(self, operation: Operation) -> Call | None:
        use = operation.use
        if (use.memory == "device") != self._is_nccl or operation.dtype.name not in _TORCH_DTYPES:
            return None
        if operation.op is ReduceOp.AVERAGE:
            return None
        call = self._call(operation)
        if not self._is_nccl:
            return call
        import torch

        def until_done() -> Any:
            # NCCL's calls return when they are queued.
            result = call()
            torch.cuda.synchronize()
            return result

        return until_done

    def _call(self, operation: Operation) -> Call:
        import torch

        dist: Any = torch.distributed
        use, group = operation.use, self._group
        array = operation.array
        data = torch.from_numpy(array) if isinstance(array, np.ndarray) else array
        op = getattr(dist.ReduceOp, operation.op.name)
        if use.collective == "broadcast":
            return _returning(data, lambda: dist.broadcast(data, 0, group=group))
        if use.collective == "allreduce" and use.in_place:
            return _returning(data, lambda: dist.all_reduce(data, op, group=group))
        out = data.new_empty(_result_count(operation))
        # Later versions have other names for them, and warn of the old ones.
        reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        calls: dict[str, Call] = {
            "allreduce": lambda: (out.copy_(data), dist.all_reduce(out, op, group=group)),
            "reduce_scatter": lambda: reduce_scatter(out, data, op, group=group),
            "allgather": lambda: all_gather(out, data, group=group),
            "alltoall": lambda: dist.all_to_all_single(out, data, group=group),
        }
        return _returning(out, calls[use.collective])


class _Named:
    """The named operations of `mpitrain.torch`, which has to be initialised for as long as this is used."""

    name = "hvd"

    def call(self, operation: Operation) -> Call | None:
        import torch

        import mpitrain.torch as hvd

        use, op = operation.use, operation.op
        if operation.dtype.name not in _TORCH_DTYPES:
            return None
        array = operation.array
        tensor = torch.from_numpy(array) if isinstance(array, np.ndarray) else array
        if not isinstance(tensor, torch.Tensor):
            tensor = tensor.tensor()
        calls: dict[str, Call] = {
            "allreduce": lambda: (hvd.allreduce_ if use.in_place else hvd.allreduce)(tensor, op=op, name="bench"),
            "broadcast": lambda: hvd.broadcast_(tensor, 0, name="bench"),
            "reduce_scatter": lambda: hvd.reducescatter(tensor, op=op, name="bench"),
            "allgather": lambda: hvd.allgather(tensor, name="bench"),
            "alltoall": lambda: hvd.alltoall(tensor, name="bench"),
        }
        return calls[use.collective]


def _returning(result: Any, call: Call) -> Call:
    def call_and_return() -> Any:
        call()
        return result

    return call_and_return


def _result_count(operation: Operation) -> int:
    return operation.part_count if operation.use.collective == "reduce_scatter" else operation.count


@contextmanager
def rivals_named(names: Sequence[str], comm: Communicator) -> Iterator[list[Rival]]:
    """Start other libraries for the ranks of an MPI world, and end them afterwards. Every rank must call.

    Raises:
        ValueError: No such library.
        UnavailableError: It is not installed, or cannot run here; on every rank.
    """
    for name in names:
        if name not in RIVALS:
            raise ValueError(f"compare: unknown library, got {name!r}; use {', '.join(RIVALS)}")
    rivals: list[Rival] = [_MPI()] if "mpi" in names else []
    with ExitStack() as stack:
        if {"gloo", "nccl"} & set(names):
            stack.enter_context(process_group(comm))
        if "gloo" in names:
            rivals.append(_Torch("Gloo"))
        if "nccl" in names:
            _check_nccl()
            rivals.append(_Torch("NCCL"))
        if "hvd" in names:
            stack.enter_context(_named_operations(comm))
            rivals.append(_Named())
        yield rivals


@contextmanager
def _named_operations(comm: Communicator) -> Iterator[None]:
    problem = "" if find_spec("torch") else "hvd: needs torch, which is not installed; pip install mpitrain[torch]"
    if found := next(filter(None, comm.allgather_obj(problem)), ""):
        raise UnavailableError(found)
    import mpitrain.torch as hvd

    hvd.init(settings=comm.settings)
    try:
        yield
    finally:
        hvd.shutdown()


@contextmanager
def process_group(comm: Communicator) -> Iterator[None]:
    """Make torch.distributed's default group of the ranks, on Gloo, for as long as the context lasts.

    Every rank must call.

    Raises:
        UnavailableError: torch is not installed; on every rank.
    """
    problem = ""
    try:
        import torch

        # Its types leave out what they do not define themselves.
        dist: Any = torch.distributed
        if not dist.is_available() or not dist.is_gloo_available():
            problem = "torch.distributed: this torch has no Gloo"
    except ImportError as error:
        problem = f"torch: not installed, got {error}; pip install mpitrain[torch]"
    if found := next(filter(None, comm.allgather_obj(problem)), ""):
        raise UnavailableError(found)
    is_one_node = len(comm.topology.nodes) == 1
    host = "127.0.0.1" if is_one_node else comm.broadcast_obj(socket.gethostname())
    store = None
    if comm.rank == 0:
        store = dist.TCPStore(host, 0, comm.size, is_master=True, wait_for_workers=False)
    port = comm.broadcast_obj(store.port if store is not None else 0)
    if store is None:
        store = dist.TCPStore(host, port, comm.size, is_master=False)
    dist.init_process_group("gloo", store=store, rank=comm.rank, world_size=comm.size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _check_nccl() -> None:
    import torch
    import torch.distributed as dist

    if not (torch.cuda.is_available() and dist.is_nccl_available()):
        raise UnavailableError("NCCL: needs CUDA devices and a torch built with NCCL, got neither here; leave it out")
