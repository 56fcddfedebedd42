"""Transport over MPI."""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Sequence
from typing import Any

from mpitrain.comm.base import Bytes, Transport
from mpitrain.comm.fence import memory_fence
from mpitrain.comm.mpi_errors import translate, translated_errors
from mpitrain.comm.mpi_native import NativeCollectives
from mpitrain.comm.mpi_request import Request
from mpitrain.comm.start import MPI
from mpitrain.errors import CollectiveMismatchError, CommError, UnavailableError
from mpitrain.memory import SharedBlock, allocate_mapped

__all__ = ["MPITransport"]

_NOTICE_TAG = 1


class MPITransport(Transport):
    """One rank's end of an MPI communicator; works on duplicates, never on the one given.

    Args:
        comm: Intracommunicator, or ranks of the world; every rank of it must call. None is the world.

    Raises:
        ValueError: The list of ranks is not usable, or lacks this rank.
        UnavailableError: MPI was initialised without MPI_THREAD_MULTIPLE (raised on every rank).
    """

    def __init__(self, comm: MPI.Comm | Sequence[int] | None = None) -> None:
        if MPI.Query_thread() < MPI.THREAD_MULTIPLE:
            raise UnavailableError(
                f"MPI: needs thread level multiple ({MPI.THREAD_MULTIPLE}), got {MPI.Query_thread()}; leave "
                "mpi4py.rc.thread_level at its default and initialise MPI through mpi4py"
            )
        source = MPI.COMM_WORLD if comm is None else comm if isinstance(comm, MPI.Comm) else _of_ranks(comm)
        self._data = _duplicate(source)
        # Set-up goes here too: on `_data` it would meet the collectives of operations in flight.
        self._notices = _duplicate(source)
        if source is not comm and comm is not None:
            source.Free()
        self.rank = self._data.Get_rank()
        self.size = self._data.Get_size()
        self.max_tag = int(self._data.Get_attr(MPI.TAG_UB) or 32767)
        self.native = NativeCollectives(self._data)
        self._outgoing: list[MPI.Request] = []
        self._outgoing_lock = threading.Lock()
        # The progress thread reads notices at any time, also while this is freed.
        self._reading_lock = threading.Lock()
        self._is_freed = False

    def isend(self, buffer: Bytes, dest: int, tag: int) -> Request:
        # No context manager here and below: it would cost as much as the call.
        try:
            return Request(self._data.Isend([buffer, MPI.BYTE], dest, tag), buffer)
        except MPI.Exception as error:
            raise translate(error.Get_error_class(), f"send to rank {dest}: {error.Get_error_string()}") from error

    def irecv(self, buffer: Bytes, source: int, tag: int) -> Request:
        try:
            return Request(self._data.Irecv([buffer, MPI.BYTE], source, tag), buffer, buffer.nbytes)
        except MPI.Exception as error:
            text = f"receive from rank {source}: {error.Get_error_string()}"
            raise translate(error.Get_error_class(), text) from error

    def test_some(self, requests: list[Request]) -> Sequence[int]:
        statuses = [MPI.Status() for _ in requests]
        try:
            done = MPI.Request.Testsome([request.mpi for request in requests], statuses)
        except MPI.Exception as error:
            raise self._failure(error, statuses) from error
        for position, index in enumerate(done or ()):
            expected = requests[index].nbytes
            if expected >= 0 and (got := statuses[position].Get_count(MPI.BYTE)) != expected:
                raise CollectiveMismatchError(
                    f"message from rank {statuses[position].Get_source()}: got {got} bytes, expected {expected}; "
                    "all ranks must bring the same count and dtype"
                )
        return done or ()

    @staticmethod
    def _failure(error: MPI.Exception, statuses: list[MPI.Status]) -> CommError | CollectiveMismatchError:
        error_class = error.Get_error_class()
        text = error.Get_error_string()
        if error_class == MPI.ERR_IN_STATUS:
            for status in statuses:
                code = status.Get_error()
                if code not in (MPI.SUCCESS, MPI.ERR_PENDING):
                    error_class, text = MPI.Get_error_class(code), MPI.Get_error_string(code)
                    break
        return translate(error_class, f"message: {text}")

    def abandon(self, requests: list[Request]) -> None:
        for request in requests:
            if request.nbytes >= 0:
                with contextlib.suppress(MPI.Exception):
                    request.mpi.Cancel()
            # Never freed, not even with the interpreter: MPI's own end, which comes later, may complete the request.
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(request))

    def notify(self, dest: int, notice: bytes) -> None:
        if MPI.Is_finalized():
            raise CommError(f"notice to rank {dest}: MPI has been finalized")
        with self._outgoing_lock, translated_errors(f"notice to rank {dest}"):
            self._outgoing = [request for request in self._outgoing if not request.Test()]
            self._outgoing.append(self._notices.isend(notice, dest, _NOTICE_TAG))

    def notices(self) -> list[tuple[int, bytes]]:
        arrived: list[tuple[int, bytes]] = []
        status = MPI.Status()
        with self._reading_lock, translated_errors("notices"):
            if self._is_freed or MPI.Is_finalized():
                return arrived
            while message := self._notices.improbe(MPI.ANY_SOURCE, _NOTICE_TAG, status):
                arrived.append((status.Get_source(), message.recv()))
        return arrived

    def gather_everywhere(self, value: Any) -> list[Any]:
        with translated_errors("set-up exchange"):
            return self._notices.allgather(value)

    def allocate_shared(self, nbytes: int) -> SharedBlock:
        try:
            return allocate_mapped(self.rank, nbytes, self.gather_everywhere, memory_fence())
        except OSError as error:
            raise CommError(f"shared memory: {error}") from error

    def node_leader(self) -> int:
        with translated_errors("node discovery"):
            node = self._notices.Split_type(MPI.COMM_TYPE_SHARED, key=self.rank)
            leader = node.bcast(self.rank, root=0)
            node.Free()
        return int(leader)

    def split(self, color: int | None, key: int) -> MPITransport | None:
        with translated_errors("split"):
            part = self._notices.Split(MPI.UNDEFINED if color is None else color, key)
            if part == MPI.COMM_NULL:
                return None
            transport = MPITransport(part)
            part.Free()
        return transport

    def ranks_of(self, comm: MPI.Comm) -> list[int] | None:
        if comm == MPI.COMM_NULL:
            return None
        with translated_errors("ranks of a communicator"):
            theirs, ours = comm.Get_group(), self._data.Get_group()
            ranks = MPI.Group.Translate_ranks(theirs, list(range(theirs.Get_size())), ours)
            theirs.Free()
            ours.Free()
        return [-1 if rank == MPI.UNDEFINED else rank for rank in ranks]

    def abort(self) -> None:
        MPI.COMM_WORLD.Abort(1)

    def free(self) -> None:
        if MPI.Is_finalized() or self._data == MPI.COMM_NULL:
            return
        # News that came too late for anybody would stay with the MPI library.
        self.notices()
        with self._reading_lock, translated_errors("free"):
            self._is_freed = True
            MPI.Request.Waitall(self._outgoing)
            self._outgoing = []
            self._notices.Free()
            self._data.Free()


def _duplicate(comm: MPI.Comm) -> MPI.Intracomm:
    if not isinstance(comm, MPI.Intracomm):
        raise TypeError(f"comm: must be an intracommunicator, got {type(comm).__name__}; merge its groups first")
    with translated_errors("duplicate"):
        duplicate = comm.Dup()
    duplicate.Set_errhandler(MPI.ERRORS_RETURN)
    return duplicate


def _of_ranks(ranks: Sequence[int]) -> MPI.Intracomm:
    world = MPI.COMM_WORLD
    rank, size = world.Get_rank(), world.Get_size()
    if rank not in ranks or len(set(ranks)) != len(ranks) or not set(ranks) <= set(range(size)):
        raise ValueError(
            f"ranks: must be different ranks of 0 to {size - 1}, this one ({rank}) among them, got {list(ranks)}; "
            "call on the listed ranks only"
        )
    with translated_errors("communicator of ranks"):
        everybody = world.Get_group()
        listed = everybody.Incl(list(ranks))
        made = world.Create_group(listed)
        listed.Free()
        everybody.Free()
    return made
