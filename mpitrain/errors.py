"""The error tree of mpitrain.

Misuse of a function raises `ValueError` or `TypeError`. What can go wrong in an
operation that was called correctly derives from `MpitrainError`:

    MpitrainError (RuntimeError)
    |-- CollectiveError             a collective did not complete
    |   |-- CollectiveMismatchError ranks brought different things to one collective
    |   `-- CommError               ranks could not exchange messages
    |       |-- CommTimeoutError    a peer did not answer in time
    |       |-- RankFailedError     a rank left the job or died
    |       `-- CommRevokedError    another rank gave this communicator up
    |-- CheckpointError             a checkpoint cannot be written or read, or does not fit
    |-- HostsUpdatedInterrupt       the ranks of an elastic job are about to change
    |-- LaunchError                 a job cannot be started
    |-- NotInitializedError         a call before init() (also a ValueError)
    `-- UnavailableError            something this machine or installation lacks

`mpitrain.torch.HorovodInternalError` is `CollectiveError` under Horovod's name.
"""

from __future__ import annotations

__all__ = [
    "CheckpointError",
    "CollectiveError",
    "CollectiveMismatchError",
    "CommError",
    "CommRevokedError",
    "CommTimeoutError",
    "HostsUpdatedInterrupt",
    "LaunchError",
    "MpitrainError",
    "NotInitializedError",
    "RankFailedError",
    "UnavailableError",
]


class MpitrainError(RuntimeError):
    """Base of every operational error of mpitrain."""


class CollectiveError(MpitrainError):
    """A collective did not complete; its output buffers are undefined."""


class CollectiveMismatchError(CollectiveError):
    """Ranks brought different operations, dtypes, shapes or roots to one collective."""


class CommError(CollectiveError):
    """Messages could not be exchanged; the communicator cannot be used any more."""


class CommTimeoutError(CommError):
    """A peer did not answer within the time limit of the settings."""


class RankFailedError(CommError):
    """A rank left the job, or died, while others still needed it."""


class CommRevokedError(CommError):
    """Another rank met an error on this communicator and told all others to give up."""


class CheckpointError(MpitrainError):
    """A checkpoint cannot be written or read, or does not fit the model that asks for it."""


class HostsUpdatedInterrupt(MpitrainError):  # noqa: N818  (Horovod's name)
    """The ranks of an elastic job are about to change: no failure, so the state stays as it is.

    Attributes:
        skip_sync: Whether the ranks that go on are equal already, so that nothing has to be broadcast.
    """

    def __init__(self, skip_sync: bool = False) -> None:
        super().__init__("the ranks of the job are about to change")
        self.skip_sync = skip_sync


class LaunchError(MpitrainError):
    """A job cannot be started: hosts, launcher or options are not usable."""


class NotInitializedError(MpitrainError, ValueError):
    """A function that needs `init()` was called before it."""


class UnavailableError(MpitrainError):
    """This machine or installation lacks what the call needs."""
