"""Counters and timelines of the face."""

from __future__ import annotations

import contextlib
import os
import time

from mpitrain.observe import CommunicationCounters, Recorder
from mpitrain.torch.world import communicator, is_initialized

__all__ = ["BackwardSpan", "communication_counters", "recorded", "start_timeline", "stop_timeline"]


def communication_counters() -> CommunicationCounters:
    """What this process has communicated since `init`, and for how many seconds that was exposed or hidden.

    The difference of two is what was communicated in between:

        before = hvd.communication_counters()
        train_one_epoch()
        spent = hvd.communication_counters() - before

    Raises:
        NotInitializedError: Before `init`.
    """
    return communicator().engine.counters


def start_timeline(file_path: str | os.PathLike[str], mark_cycles: bool = False) -> None:
    """Record from now on what all ranks do, at any time; rank 0 writes the file when that ends.

    It is enough that rank 0 calls: the others then record a quarter of a second later at most. Where all ranks call,
    each records at once; what a rank does before rank 0 has called is not shown.

    Args:
        file_path: For `chrome://tracing` or https://ui.perfetto.dev; replaced if it exists.
        mark_cycles: Mark the rounds in which rank 0 decides which named operations run.

    Raises:
        NotInitializedError: Before `init`.
        ValueError: A timeline is being recorded (on rank 0).
        OSError: The file cannot be written (on rank 0).
    """
    communicator().timeline.start(file_path, mark_cycles=mark_cycles)


def stop_timeline() -> None:
    """Write the timeline; rank 0 collects what all have recorded, the others return at once.

    A rank that does not answer within some seconds is left out, and named in the file and in a warning.

    Raises:
        NotInitializedError: Before `init`.
        OSError: The file cannot be written (on rank 0).
    """
    communicator().timeline.stop()


def recorded(name: str) -> contextlib.AbstractContextManager[None]:
    """Show the body in the timeline, if there is one."""
    recorder = communicator().engine.recorder if is_initialized() else None
    return contextlib.nullcontext() if recorder is None else recorder.span(name)


class BackwardSpan:
    """Shows a backward pass in the timeline: from its first gradient to its last, as nobody says when it begins."""

    def __init__(self) -> None:
        self._began_ns = 0
        self._ended_ns = 0
        self._lane = 0

    def note_gradient(self, recorder: Recorder, name: str, began_ns: int) -> None:
        """A gradient has been copied into its bucket since `began_ns`."""
        recorder.add_step("bucket fill", began_ns, name)
        self._began_ns = self._began_ns or began_ns
        self._ended_ns = time.monotonic_ns()
        self._lane = recorder.thread_lane()

    def end(self, recorder: Recorder | None) -> None:
        """The pass is over, if there was one."""
        if recorder is not None and self._began_ns:
            recorder.add("backward", self._began_ns, self._ended_ns, lane=self._lane)
        self._began_ns = 0
