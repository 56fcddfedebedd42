"""Reports of ranks that others wait for: what they did last, and where they are now.

Pure: what ranks answer in, text out.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Mapping, Sequence
from typing import NamedTuple

__all__ = ["Whereabouts", "report_of_stall", "stack_of_thread"]

_MOST_FRAMES = 8
_MOST_RANKS = 16


class Whereabouts(NamedTuple):
    """What a rank says about itself.

    Attributes:
        num_calls: Operations that it has called on the communicator.
        last: Description of the latest of them, "" for none.
        stack: Where its main thread is, outermost first.
    """

    num_calls: int
    last: str
    stack: tuple[str, ...]


def stack_of_thread(identity: int) -> tuple[str, ...]:
    """Return the innermost calls of a thread of this process, outermost first; nothing if it has ended."""
    frame = sys._current_frames().get(identity)  # noqa: SLF001  (the documented way)
    if frame is None:
        return ()
    calls = traceback.extract_stack(frame)[-_MOST_FRAMES:]
    return tuple(f"{call.filename}:{call.lineno} in {call.name}" for call in calls)


def report_of_stall(
    subject: str, call_index: int, waited_s: float, size: int, answers: Mapping[int, Whereabouts]
) -> str:
    """Return the report of an operation that some ranks wait in.

    Args:
        subject: Its description.
        call_index: How many operations were called on the communicator before it.
        waited_s: For how long it has not moved.
        size: Number of ranks.
        answers: Of the ranks that have answered, this one's among them.
    """
    silent = [rank for rank in range(size) if rank not in answers]
    missing = [rank for rank, answer in sorted(answers.items()) if answer.num_calls <= call_index]
    arrived = [rank for rank, answer in sorted(answers.items()) if answer.num_calls > call_index]
    lines = [f"{subject}: waits for other ranks since {waited_s:.0f} s", f"  arrived: ranks {_listed(arrived)}"]
    for rank in missing[:_MOST_RANKS]:
        lines += [f"  missing: rank {rank}, {_last_of(answers[rank])}", *_stack_of(answers[rank])]
    if len(missing) > _MOST_RANKS:
        lines.append(f"  missing: further ranks {_listed(missing[_MOST_RANKS:])}")
    if silent:
        lines.append(f"  no answer: ranks {_listed(silent)}; their processes are stopped, or busy without letting go")
    if not missing and not silent:
        # All have come, so the messages do not, or a rank waits within: then all are of interest.
        for rank in arrived[:_MOST_RANKS]:
            lines += [f"  rank {rank} is at", *_stack_of(answers[rank])]
    return "\n".join(lines)


def _last_of(answer: Whereabouts) -> str:
    if not answer.num_calls:
        return "which has called nothing here yet; it is at"
    return f"which has called {answer.num_calls} operations here, the latest {answer.last or 'a small one'}; it is at"


def _stack_of(answer: Whereabouts) -> list[str]:
    return [f"    {call}" for call in answer.stack] or ["    (its thread has ended)"]


def _listed(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks)) if ranks else "none"
