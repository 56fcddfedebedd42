"""The MPI library's own collectives, for every dtype and in blocking or non-blocking form.

Each function starts one collective and returns the requests that remain: none after a blocking call. Counts
above what the MPI standard's `int` holds are cut into several calls where the collective allows it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpitrain.comm.mpi_errors import translated_errors
from mpitrain.comm.mpi_request import Request
from mpitrain.comm.start import MPI
from mpitrain.errors import UnavailableError
from mpitrain.memory import DType, ReduceOp, reduce_into

__all__ = ["NativeCollectives"]

# Elements per call, far enough below 2**31 for libraries that compute bytes in an int.
_LARGEST_COUNT = 1 << 28

_MPI_OPS = {
    ReduceOp.AVERAGE: MPI.SUM,
    ReduceOp.SUM: MPI.SUM,
    ReduceOp.MIN: MPI.MIN,
    ReduceOp.MAX: MPI.MAX,
    ReduceOp.PRODUCT: MPI.PROD,
}
_LOGICAL_OPS = {
    ReduceOp.SUM: MPI.LOR,
    ReduceOp.MAX: MPI.LOR,
    ReduceOp.MIN: MPI.LAND,
    ReduceOp.PRODUCT: MPI.LAND,
}
_DATATYPES = {
    "bool": MPI.C_BOOL,
    **{f"int{bits}": getattr(MPI, f"INT{bits}_T") for bits in (8, 16, 32, 64)},
    **{f"uint{bits}": getattr(MPI, f"UINT{bits}_T") for bits in (8, 16, 32, 64)},
    "float16": MPI.FLOAT16_T,
    "bfloat16": MPI.BFLOAT16_T,
    "float32": MPI.FLOAT,
    "float64": MPI.DOUBLE,
    "complex64": MPI.C_FLOAT_COMPLEX,
    "complex128": MPI.C_DOUBLE_COMPLEX,
}


class NativeCollectives:
    """Starts collectives of the MPI library on one communicator."""

    def __init__(self, comm: MPI.Comm) -> None:
        self._comm = comm

    def barrier(self, *, blocking: bool) -> list[Request]:
        """Start a barrier."""
        with translated_errors("native barrier"):
            if blocking:
                self._comm.Barrier()
                return []
            return [Request(self._comm.Ibarrier())]

    def allreduce(
        self, data: NDArray[Any], dtype: DType, op: ReduceOp, *, blocking: bool, source: NDArray[Any] | None = None
    ) -> list[Request]:
        """Start reducing `data` over all ranks, in place.

        Where all ranks block, all may give a `source` instead, which is reduced into `data`.
        """
        datatype, mpi_op = self._reduction(dtype, op)
        requests: list[Request] = []
        with translated_errors("native allreduce"):
            if source is not None:
                assert blocking
                for sent, piece in zip(_pieces(source), _pieces(data), strict=True):
                    self._comm.Allreduce([sent, datatype], [piece, datatype], mpi_op)
                return requests
            for piece in _pieces(data):
                if blocking:
                    self._comm.Allreduce(MPI.IN_PLACE, [piece, datatype], mpi_op)
                else:
                    requests.append(Request(self._comm.Iallreduce(MPI.IN_PLACE, [piece, datatype], mpi_op), piece))
        return requests

    def reduce(self, data: NDArray[Any], dtype: DType, op: ReduceOp, root: int, *, blocking: bool) -> list[Request]:
        """Start reducing `data` to the root, in place there; unchanged elsewhere."""
        datatype, mpi_op = self._reduction(dtype, op)
        is_root = self._comm.rank == root
        requests = []
        with translated_errors("native reduce"):
            for piece in _pieces(data):
                sendbuf = MPI.IN_PLACE if is_root else [piece, datatype]
                recvbuf = [piece, datatype] if is_root else None
                if blocking:
                    self._comm.Reduce(sendbuf, recvbuf, mpi_op, root)
                else:
                    requests.append(Request(self._comm.Ireduce(sendbuf, recvbuf, mpi_op, root), piece))
        return requests

    def broadcast(self, data: NDArray[Any], dtype: DType, root: int, *, blocking: bool) -> list[Request]:
        """Start copying the root's `data` to all ranks."""
        datatype = _carrier(dtype)
        requests = []
        with translated_errors("native broadcast"):
            for piece in _pieces(data):
                if blocking:
                    self._comm.Bcast([piece, datatype], root)
                else:
                    requests.append(Request(self._comm.Ibcast([piece, datatype], root), piece))
        return requests

    def reduce_scatter(
        self,
        data: NDArray[Any],
        out: NDArray[Any],
        counts: Sequence[int],
        dtype: DType,
        op: ReduceOp,
        *,
        blocking: bool,
    ) -> list[Request]:
        """Start reducing `data`, of which rank r gets the r-th part of `counts[r]` elements in `out`."""
        datatype, mpi_op = self._reduction(dtype, op)
        self._check_total("reduce_scatter", counts)
        arguments = ([data, datatype], [out, datatype], list(counts), mpi_op)
        with translated_errors("native reduce_scatter"):
            if blocking:
                self._comm.Reduce_scatter(*arguments)
                return []
            return [Request(self._comm.Ireduce_scatter(*arguments), arguments)]

    def allgather(self, data: NDArray[Any], counts: Sequence[int], dtype: DType, *, blocking: bool) -> list[Request]:
        """Start filling `data`, which holds this rank's part in its place, with the parts of all."""
        self._check_total("allgather", counts)
        arguments = (MPI.IN_PLACE, _parts(data, counts, dtype))
        with translated_errors("native allgather"):
            if blocking:
                self._comm.Allgatherv(*arguments)
                return []
            return [Request(self._comm.Iallgatherv(*arguments), arguments)]

    def gather(
        self,
        part: NDArray[Any],
        out: NDArray[Any] | None,
        counts: Sequence[int],
        dtype: DType,
        root: int,
        *,
        blocking: bool,
    ) -> list[Request]:
        """Start collecting the ranks' parts in the root's `out`."""
        self._check_total("gather", counts)
        arguments = ([part, _carrier(dtype)], None if out is None else _parts(out, counts, dtype), root)
        with translated_errors("native gather"):
            if blocking:
                self._comm.Gatherv(*arguments)
                return []
            return [Request(self._comm.Igatherv(*arguments), arguments)]

    def scatter(
        self,
        data: NDArray[Any] | None,
        out: NDArray[Any],
        counts: Sequence[int],
        dtype: DType,
        root: int,
        *,
        blocking: bool,
    ) -> list[Request]:
        """Start handing out the root's `data`; rank r gets its r-th part."""
        self._check_total("scatter", counts)
        arguments = (None if data is None else _parts(data, counts, dtype), [out, _carrier(dtype)], root)
        with translated_errors("native scatter"):
            if blocking:
                self._comm.Scatterv(*arguments)
                return []
            return [Request(self._comm.Iscatterv(*arguments), arguments)]

    def alltoall(
        self,
        data: NDArray[Any],
        out: NDArray[Any],
        send_counts: Sequence[int],
        receive_counts: Sequence[int],
        dtype: DType,
        *,
        blocking: bool,
    ) -> list[Request]:
        """Start sending the r-th part of `data` to rank r; `out` gets what the ranks sent, in their order."""
        self._check_total("alltoall", send_counts)
        self._check_total("alltoall", receive_counts)
        arguments = (_parts(data, send_counts, dtype), _parts(out, receive_counts, dtype))
        with translated_errors("native alltoall"):
            if blocking:
                self._comm.Alltoallv(*arguments)
                return []
            return [Request(self._comm.Ialltoallv(*arguments), arguments)]

    def _reduction(self, dtype: DType, op: ReduceOp) -> tuple[MPI.Datatype, MPI.Op]:
        datatype = _DATATYPES[dtype.name]
        if datatype != MPI.DATATYPE_NULL:
            return datatype, (_LOGICAL_OPS if dtype.kind == "bool" else _MPI_OPS)[op]
        # The library does not know the type: give it our own reduction over 16-bit words.
        return MPI.UINT16_T, _user_op(op, dtype)

    @staticmethod
    def _check_total(name: str, counts: Sequence[int]) -> None:
        if sum(counts) > np.iinfo(np.int32).max:
            raise UnavailableError(
                f"native {name}: the MPI library counts in 32 bits, got {sum(counts)} elements; name another algorithm"
            )


# Operations belong to no communicator, and a process can have only 32 of them (mpi4py 4.1): all communicators share.
@functools.cache
def _user_op(op: ReduceOp, dtype: DType) -> MPI.Op:
    def reduce(operand: Any, accumulator: Any, _datatype: MPI.Datatype) -> None:
        reduce_into(np.frombuffer(accumulator, dtype.storage), np.frombuffer(operand, dtype.storage), op, dtype)

    return MPI.Op.Create(reduce, commute=True)


def _carrier(dtype: DType) -> MPI.Datatype:
    """Return a datatype of the right size; all that moving without reducing needs."""
    datatype = _DATATYPES[dtype.name]
    return MPI.UINT16_T if datatype == MPI.DATATYPE_NULL else datatype


def _parts(data: NDArray[Any], counts: Sequence[int], dtype: DType) -> list[Any]:
    offsets = list(accumulate(counts, initial=0))[: len(counts)]
    return [data, (list(counts), offsets), _carrier(dtype)]


def _pieces(data: NDArray[Any]) -> list[NDArray[Any]]:
    if data.size <= _LARGEST_COUNT:
        return [data]
    return [data[begin : begin + _LARGEST_COUNT] for begin in range(0, data.size, _LARGEST_COUNT)]
