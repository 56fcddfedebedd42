"""`horovod.common.exceptions`."""

from __future__ import annotations

from mpitrain.errors import CollectiveError as HorovodInternalError
from mpitrain.errors import HostsUpdatedInterrupt

__all__ = ["HorovodInternalError", "HorovodVersionMismatchError", "HostsUpdatedInterrupt"]


class HorovodVersionMismatchError(ImportError):
    """Horovod was built for another version of a framework: never raised, as nothing here is built."""
