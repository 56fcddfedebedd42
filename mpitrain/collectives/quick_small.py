"""Quick all-reduces of small arrays, which are brought to the meeting of the node's ranks."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from numpy.typing import NDArray

from mpitrain.collectives.context import Context
from mpitrain.collectives.meeting import DIGEST, LINE
from mpitrain.collectives.quick import Caller, Quick
from mpitrain.collectives.small import SmallAllreduce

__all__ = ["QuickSmall"]


class QuickSmall(Quick):
    """See `Quick`.

    Args:
        context: Of the communicator.
        caller: Makes its calls.
        small: Does the work.
        shape: Of the arrays.
        description: As in the plan.
    """

    def __init__(
        self, context: Context, caller: Caller, small: SmallAllreduce, shape: tuple[int, ...], description: str
    ) -> None:
        super().__init__(context, caller, small.nbytes, description)
        self._small = small
        if small.is_whole:
            self.run = self._run_whole(shape)  # type: ignore[method-assign]

    def _come(self, data: NDArray[Any], _total: NDArray[Any], /) -> None:
        self._small.bring(data)
        self._meeting.arrive(self._digest)

    def _reduce(self, data: NDArray[Any], total: NDArray[Any], index: int) -> None:
        self._meet(data, total, index)
        self._caller.drive(self._small.take(data, total), self._description, index)

    def _run_whole(self, shape: tuple[int, ...]) -> Callable[..., NDArray[Any]]:  # noqa: C901, PLR0915
        """Return `run` for arrays that every rank reduces whole.

        Of an exchange of a few bytes most is the Python in between. So this is one function, which does what `Quick`,
        `Meeting` and `SmallAllreduce` do, and has at hand what it needs. A new result is made by the reduction itself.
        """
        caller, meeting, small = self._caller, self._meeting, self._small
        calls, watch, engine = caller.calls, caller.watch, caller.engine
        nbytes, digest, polls, own, others = self._nbytes, self._digest, self._polls, meeting.own, meeting.others
        fence = meeting.fence if meeting.needs_fence else None
        (place_0, place_1), (reduce_0, reduce_1) = small.own(shape), small.reducers(shape)

        def run(data: NDArray[Any], result: NDArray[Any] | None = None) -> NDArray[Any]:  # noqa: C901, PLR0912
            began_ns = 0 if engine.recorder is None else time.monotonic_ns()
            index = calls.number
            if watch.revoked is not None:
                watch.check(index)
            calls.number = index + 1
            calls.nbytes += nbytes
            try:
                meeting.number = number = meeting.number + 1
                if number & 1:
                    place_1[...] = data
                    reduce, flag = reduce_1, LINE
                else:
                    place_0[...] = data
                    reduce, flag = reduce_0, 0
                own[flag + DIGEST] = digest
                if fence is not None:
                    fence()
                own[flag] = number
                agrees = True
                for flags in others:
                    if flags[flag] != number:
                        left = polls
                        while flags[flag] != number and left:
                            left -= 1
                        agrees = agrees and left > 0
                if fence is not None:
                    fence()
                if agrees:
                    for flags in others:
                        if flags[flag + DIGEST] != digest:
                            agrees = False
                if not agrees:
                    flat = data.reshape(-1)
                    self._come_again(flat, flat, index)
                    reduce = reduce_1 if meeting.number & 1 else reduce_0
                total = reduce() if result is None else reduce(result)
            except BaseException as error:
                self._fail(error, index)
                raise
            if began_ns:
                self._record(began_ns)
            return total

        return run
