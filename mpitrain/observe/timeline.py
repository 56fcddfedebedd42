"""The timeline of a job: every rank records, rank 0 collects and writes one file.

Rank 0 decides: its start makes all others record, and its stop makes them send what they have. A rank that is told so
is told by news, which its progress thread reads even while its main thread computes, so neither needs a call of the
others. A rank that starts by itself, as all do when they are asked to at the same place of a script, records from that
moment on; what was before rank 0's start is cut off.

Each rank compares its clock with rank 0's when it starts and when it ends.
"""

from __future__ import annotations

import logging
import os
import pickle
import socket
import threading
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mpitrain.observe.clocks import SAME_CLOCK, ClockMap, Exchange, Offset, estimate_offset
from mpitrain.observe.recorder import Recorder
from mpitrain.observe.trace_file import Part, write_trace

__all__ = ["Timeline"]

_log = logging.getLogger("mpitrain")

_COLLECTOR = 0
_NUM_EXCHANGES = 16
# Small enough for a message that needs no answer from the receiver's main thread.
_PIECE_NBYTES = 256 << 10
_POLL_S = 100e-6
# Whoever was asked for the time is asked again soon: it keeps looking for so long.
_ALERT_S = 0.05
# How long rank 0 waits for the next piece, and the others for rank 0; and for one that has left meanwhile.
_PATIENCE_S = 10.0
_PATIENCE_WITH_LEAVERS_S = 2.0
_CLOCK_PATIENCE_S = 1.0


class Timeline:
    """One rank's part of the timeline of a communicator.

    Args:
        rank: This rank.
        size: Number of ranks.
        has_reference_clock: Whether this rank and rank 0 read the same clock.
        send: Sends news to a rank; `receive` gets it there.
        read_news: Reads what has arrived, which calls `receive`.
        has_left: Whether a rank is known to take part in nothing any more.
        install: Makes this process record, or no longer; False if it records for somebody else.
        capacity: Events kept of each rank.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        *,
        has_reference_clock: bool,
        send: Callable[[int, bytes], None],
        read_news: Callable[[], None],
        has_left: Callable[[int], bool],
        install: Callable[[Recorder | None], bool],
        capacity: int,
    ) -> None:
        self._rank = rank
        self._size = size
        self._has_reference_clock = has_reference_clock
        self._send = send
        self._read_news = read_news
        self._has_left = has_left
        self._install = install
        self._capacity = capacity
        self._lock = threading.RLock()
        self._recorder: Recorder | None = None
        self._first: Offset | None = None
        self._exchanges: list[Exchange] | None = None
        self._after_exchanges: Callable[[Offset | None], None] = self._set_first
        self._alert_until_s = 0.0
        self._is_delivered = True
        # Rank 0 counts its starts; 0 is a start that it has not told yet.
        self._session = 0
        # Of rank 0 only.
        self._starts = 0
        self._path = Path()
        self._begin_ns = 0
        self._pieces: dict[int, list[bytes]] = {}
        self._parts: dict[int, Part] = {}

    @property
    def is_recording(self) -> bool:
        """Whether this rank records."""
        return self._recorder is not None

    @property
    def is_alert(self) -> bool:
        """Whether news should be read often now."""
        return self._exchanges is not None or time.monotonic() < self._alert_until_s

    def start(self, path: str | os.PathLike[str], *, mark_cycles: bool = False) -> None:
        """Record from now on; called by rank 0, or by all ranks.

        Args:
            path: File that `stop` writes, on rank 0.
            mark_cycles: Mark the rounds in which named operations are decided.

        Raises:
            ValueError: A timeline is being recorded (on rank 0).
            OSError: The folder of the file cannot be written (on rank 0).
        """
        if self._rank != _COLLECTOR:
            self._begin(0, mark_cycles)
            return
        path, begin_ns = Path(path), time.monotonic_ns()
        if not self.is_recording:
            # If it cannot be written at the end, better to know it now; and so there is a file whatever happens.
            write_trace(path, self._size, {}, begin_ns, begin_ns)
        if self.is_recording or not self._begin(self._starts + 1, mark_cycles):
            raise ValueError(
                f"timeline: cannot be written to {path}, one is being recorded already; stop that one first"
            )
        self._starts += 1
        self._path, self._begin_ns = path, begin_ns
        self._pieces, self._parts = {}, {}
        self._tell_all("start", self._session, mark_cycles)

    def stop(self) -> None:
        """Stop recording; rank 0 collects the events of all ranks and writes the file.

        Rank 0 waits for ranks that do not answer for some seconds only; the file says who is missing. Without `start`
        this does nothing, and on other ranks than 0 it returns at once.

        Raises:
            OSError: The file cannot be written (on rank 0).
        """
        if self._rank != _COLLECTOR or not self.is_recording:
            return
        end_ns = time.monotonic_ns()
        self._parts[_COLLECTOR] = self._end(SAME_CLOCK)
        self._tell_all("collect", self._session)
        self._await_parts()
        write_trace(self._path, self._size, self._parts, self._begin_ns, end_ns)
        dropped = sum(part.dropped for part in self._parts.values())
        if dropped:
            _log.warning("timeline: holds the latest events only, %d earlier ones did not fit", dropped)
        missing = [rank for rank in range(self._size) if rank not in self._parts]
        if missing:
            _log.warning("timeline: ranks %s have not sent their events; %s is without them", missing, self._path)
        self._pieces, self._parts = {}, {}

    def finish(self) -> None:
        """End at the end of this process: rank 0 writes the file, the others hand over what they have; never raises."""
        try:
            if self._rank == _COLLECTOR:
                self.stop()
                return
            # What rank 0 has said before may not have been read yet.
            self._read_news()
            if self.is_recording and self._session:
                self._deliver()
                self._poll(lambda: self._is_delivered, [_COLLECTOR])
        except Exception as error:  # noqa: BLE001  (whatever is wrong with the picture, the job ends as it would without)
            _log.warning("timeline: could not be completed: %s", error)

    def receive(self, source: int, news: bytes) -> None:
        """Take what another rank has sent."""
        kind, *values = pickle.loads(news)
        getattr(self, f"_on_{kind}")(source, *values)

    # News

    def _on_start(self, _source: int, session: int, mark_cycles: bool) -> None:
        if not self._begin(session, mark_cycles):
            self._session = session

    def _on_collect(self, _source: int, session: int) -> None:
        self._session = session
        self._deliver()

    def _on_ask(self, source: int, sent_ns: int) -> None:
        self._alert_until_s = time.monotonic() + _ALERT_S
        self._tell(source, "answer", sent_ns, time.monotonic_ns())

    def _on_answer(self, _source: int, sent_ns: int, reference_ns: int) -> None:
        received_ns = time.monotonic_ns()
        with self._lock:
            if self._exchanges is None:
                return
            self._exchanges.append(Exchange(sent_ns, reference_ns, received_ns))
            if len(self._exchanges) < _NUM_EXCHANGES:
                self._ask()
            else:
                self._end_exchanges()

    def _on_piece(self, source: int, session: int, count: int, data: bytes) -> None:
        if session != self._session:
            return  # of an earlier timeline, for which nobody waits any more
        pieces = self._pieces.setdefault(source, [])
        pieces.append(data)
        if len(pieces) == count:
            self._parts[source] = pickle.loads(zlib.decompress(b"".join(self._pieces.pop(source))))
            self._tell(source, "received")

    def _on_received(self, _source: int) -> None:
        self._is_delivered = True

    # Recording

    def _begin(self, session: int, mark_cycles: bool) -> bool:
        """Start to record, unless that is being done already; whether it was started."""
        with self._lock:
            recorder = Recorder(self._capacity, mark_cycles=mark_cycles)
            if self.is_recording or not self._install(recorder):
                return False
            self._recorder = recorder
            self._session = session
            self._first = SAME_CLOCK if self._has_reference_clock else None
            self._is_delivered = False
            if not self._has_reference_clock:
                self._begin_exchanges(self._set_first)
            return True

    def _end(self, last: Offset | None) -> Part:
        assert self._recorder is not None
        recorder, self._recorder = self._recorder, None
        self._install(None)
        events, dropped = recorder.take()
        clocks = ClockMap(self._first, last)
        return Part(socket.gethostname(), os.getpid(), events, dropped, recorder.lane_names, clocks)

    def _set_first(self, offset: Offset | None) -> None:
        self._first = offset

    # Clocks

    def _begin_exchanges(self, then: Callable[[Offset | None], None]) -> None:
        self._exchanges = []
        self._after_exchanges = then
        self._ask()

    def _ask(self) -> None:
        self._tell(_COLLECTOR, "ask", time.monotonic_ns())

    def _end_exchanges(self) -> None:
        exchanges, self._exchanges = self._exchanges, None
        self._after_exchanges(estimate_offset(exchanges or ()))

    # Collecting

    def _deliver(self) -> None:
        with self._lock:
            if not self.is_recording:
                return
            if self._has_reference_clock:
                self._send_part(SAME_CLOCK)
            else:
                self._begin_exchanges(self._send_part)

    def _send_part(self, last: Offset | None) -> None:
        if not self.is_recording:
            return
        data = zlib.compress(pickle.dumps(self._end(last)), 1)
        pieces = [data[first : first + _PIECE_NBYTES] for first in range(0, len(data), _PIECE_NBYTES)]
        for piece in pieces:
            self._tell(_COLLECTOR, "piece", self._session, len(pieces), piece)

    def _await_parts(self) -> None:
        """Wait until all parts are here, as long as something still comes."""
        while True:
            before = self._progress()

            def has_news(before: int = before) -> bool:
                return self._progress() > before or not self._missing()

            self._poll(has_news, self._missing())
            if not self._missing() or self._progress() == before:
                return

    def _progress(self) -> int:
        return len(self._parts) + sum(len(pieces) for pieces in self._pieces.values())

    def _missing(self) -> list[int]:
        return [rank for rank in range(self._size) if rank not in self._parts]

    def _poll(self, is_done: Callable[[], bool], others: Sequence[int]) -> None:
        """Read news until something is done, or these ranks could have done it."""
        began_s = time.monotonic()
        while not is_done():
            self._read_news()
            waited_s = time.monotonic() - began_s
            # One that has left may still have sent something before.
            have_left = all(self._has_left(rank) for rank in others)
            if waited_s > (_PATIENCE_WITH_LEAVERS_S if have_left else _PATIENCE_S):
                return
            with self._lock:
                if self._exchanges is not None and waited_s > _CLOCK_PATIENCE_S:
                    self._end_exchanges()
            time.sleep(_POLL_S)

    def _tell(self, dest: int, kind: str, *values: Any) -> None:
        self._send(dest, pickle.dumps((kind, *values)))

    def _tell_all(self, kind: str, *values: Any) -> None:
        for rank in range(self._size):
            if rank != self._rank:
                self._tell(rank, kind, *values)
