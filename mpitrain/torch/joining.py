"""`join`: for ranks that have run out of data before the others."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from mpitrain.torch.passes import finish_steps
from mpitrain.torch.world import negotiators

__all__ = ["join"]


def join(device: int = -1) -> int:
    """Say that this rank has no more data, and return when all ranks have said so.

        for batch in loader:                  # more batches on some ranks than on others
            ...
        hvd.join()

    Until then this rank takes part in what the others do, with what changes nothing: zeros in sums, averages (which are
    still divided by the number of all ranks), Adasum and gradients of a `DistributedOptimizer`; no rows in allgathers
    and alltoalls; the largest or smallest value, or one, in `Min`, `Max` and `Product`. Results are dropped: neither
    parameters nor gradients change here, so afterwards they should be broadcast from the rank that is returned. On all
    process sets that include this rank.

    Where there is no such thing, the others get a `HorovodInternalError`: for a broadcast from a rank that has joined,
    and for rows that an alltoall sends to it. Parameters cannot be added to an optimizer while ranks have joined.

    Args:
        device: Not needed; accepted as in Horovod.

    Returns:
        The rank that joined last, the same on every rank.

    Raises:
        HorovodInternalError: The ranks could not exchange messages.
    """
    del device
    finish_steps()
    due: deque[Callable[[], None]] = deque()
    groups = negotiators()
    # The first is that of all ranks.
    handles = [negotiator.join(due.append) for negotiator in groups]
    engine = groups[0].comm.engine
    waiting = list(handles)
    while waiting:
        engine.wait_until(lambda: due or any(handle.done for handle in waiting), "join")
        # Before anything else, as the others wait for it.
        while due:
            due.popleft()()
        for handle in [each for each in waiting if each.done]:
            handle.wait()
            waiting.remove(handle)
    (last,) = handles[0].wait()
    return int(last)
