"""What a communicator's ranks tell each other beside its operations: timelines, and where late ranks are."""

from __future__ import annotations

import functools
import logging
import threading
from pathlib import Path

from mpitrain.collectives.calls import Calls
from mpitrain.collectives.peers import PeerWatch
from mpitrain.collectives.progress import ProgressEngine
from mpitrain.collectives.stall_reports import StallReports
from mpitrain.comm import Topology
from mpitrain.config import Settings
from mpitrain.observe import Timeline, Whereabouts, stack_of_thread

__all__ = ["Observer"]

_TIMELINE = b"timeline"
_STALL = b"stall"

_log = logging.getLogger("mpitrain")


class Observer:
    """One rank's part of it; the progress thread reads its news while everybody else is busy.

    Args:
        topology: Of the communicator.
        settings: Of the communicator.
        engine: Its operations are recorded.
        watch: Carries the news.
        calls: Of the communicator.

    Attributes:
        timeline: Of all that the engine's process does, on all communicators.
    """

    def __init__(
        self,
        topology: Topology,
        settings: Settings,
        engine: ProgressEngine,
        watch: PeerWatch,
        calls: Calls,
    ) -> None:
        self._watch = watch
        self._calls = calls
        size = sum(len(ranks) for ranks in topology.nodes)
        self.timeline = Timeline(
            topology.rank,
            size,
            has_reference_clock=0 in topology.local_ranks,
            send=functools.partial(watch.send, _TIMELINE),
            read_news=watch.read_news,
            has_left=watch.has_left,
            install=engine.install,
            capacity=settings.timeline_events,
        )
        watch.subscribe(_TIMELINE, self.timeline.receive)
        self._caller = threading.get_ident()
        engine.count(calls)
        self._stalls = StallReports(topology.rank, size, functools.partial(watch.send, _STALL), self._whereabouts)
        watch.subscribe(_STALL, self._stalls.receive)
        watch.on_stall = self._stalls.note
        if size > 1:
            engine.serve_regularly(self.serve)

    def serve(self) -> bool:
        """Read news; whether more are expected soon."""
        self._watch.read_news()
        self._stalls.attend()
        return self.timeline.is_alert

    def _whereabouts(self) -> Whereabouts:
        return Whereabouts(self._calls.number, self._watch.latest, stack_of_thread(self._caller))

    def start_timeline_of_job(self, path: str) -> None:
        """Record the whole life of a communicator, if the settings name a file; it is written at the end."""
        if not path:
            return
        global _timelines  # noqa: PLW0603  (files are a matter of the process)
        _timelines += 1
        file = Path(path)
        if _timelines > 1:
            # A second communicator of the process, one after shutdown and init for example, does not overwrite it.
            file = file.with_name(f"{file.stem}.{_timelines}{file.suffix}")
        try:
            self.timeline.start(file)
        except (OSError, ValueError) as error:
            _log.warning("%s; the job goes on without a timeline", error)


_timelines = 0
