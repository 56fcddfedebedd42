"""The one place where errors of the MPI library become ours."""

from __future__ import annotations

from types import TracebackType

from mpitrain.comm.start import MPI
from mpitrain.errors import CollectiveMismatchError, CommError, CommRevokedError, RankFailedError

__all__ = ["translate", "translated_errors"]


def _error_class(name: str) -> int | None:
    value = getattr(MPI, name, None)
    return None if value is None or value == MPI.UNDEFINED else int(value)


_FAILED = {_error_class("ERR_PROC_FAILED"), _error_class("ERR_PROC_FAILED_PENDING")} - {None}
_REVOKED = {_error_class("ERR_REVOKED")} - {None}


class translated_errors:  # noqa: N801 - used like a function
    """Raise `MPI.Exception` of the body of a `with` as the error of our tree that fits best.

    Not a generator: that would cost more than a small collective.
    """

    __slots__ = ("_subject",)

    def __init__(self, subject: str) -> None:
        self._subject = subject

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if isinstance(error, MPI.Exception):
            raise translate(error.Get_error_class(), f"{self._subject}: {error.Get_error_string()}") from error


def translate(error_class: int, text: str) -> CommError | CollectiveMismatchError:
    """Return the error of our tree that fits an MPI error class best."""
    if error_class == MPI.ERR_TRUNCATE:
        return CollectiveMismatchError(
            f"{text}; a rank sent more than another expects: all ranks must bring the same count and dtype"
        )
    if error_class in _FAILED:
        return RankFailedError(f"{text}; a rank of the job has died")
    if error_class in _REVOKED:
        return CommRevokedError(f"{text}; another rank gave the communicator up")
    return CommError(text)
