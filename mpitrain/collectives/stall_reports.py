"""Who is late: asked and told by news, so that progress threads answer for main threads that are busy elsewhere.

A rank that has waited for too long tells rank 0, which asks all others where they are and reports what they say. No
message is sent before that.
"""

from __future__ import annotations

import logging
import pickle
import threading
import time
from collections.abc import Callable

from mpitrain.observe import Whereabouts, report_of_stall

__all__ = ["StallReports"]

_log = logging.getLogger("mpitrain")

_REPORTER = 0
# How long rank 0 waits for answers, and the others for rank 0.
_ANSWER_LIMIT_S = 3.0


class _Inquiry:
    def __init__(self, subject: str, waited_s: float) -> None:
        self.subject = subject
        self.waited_s = waited_s
        self.asked_s = time.monotonic()
        self.answers: dict[int, Whereabouts] = {}


class StallReports:
    """One rank's part of the reports of a communicator.

    Args:
        rank: This rank.
        size: Number of ranks.
        send: Sends news to a rank; `receive` gets it there.
        whereabouts: Tells where this rank is.
    """

    def __init__(
        self, rank: int, size: int, send: Callable[[int, bytes], None], whereabouts: Callable[[], Whereabouts]
    ) -> None:
        self._rank = rank
        self._size = size
        self._send = send
        self._whereabouts = whereabouts
        self._lock = threading.RLock()
        # By the number of the call: on rank 0 what it has asked about, elsewhere what it has told rank 0.
        self._inquiries: dict[int, _Inquiry] = {}
        # Of which calls rank 0 has reported, or said that it will.
        self._known: set[int] = set()

    def note(self, subject: str, call_index: int, waited_s: float) -> None:
        """This rank has waited long in an operation."""
        with self._lock:
            if call_index in self._known or call_index in self._inquiries:
                return
            self._inquiries[call_index] = _Inquiry(subject, waited_s)
        if self._rank == _REPORTER:
            for rank in range(1, self._size):
                self._send(rank, pickle.dumps(("ask", call_index)))
        else:
            self._send(_REPORTER, pickle.dumps(("note", call_index, subject, waited_s)))

    def receive(self, source: int, news: bytes) -> None:
        """Take what another rank has sent."""
        kind, call_index, *values = pickle.loads(news)
        if kind == "note":
            self._send(source, pickle.dumps(("noted", call_index)))
            self.note(values[0], call_index, values[1])
        elif kind == "ask":
            self._send(source, pickle.dumps(("answer", call_index, *self._whereabouts())))
        elif kind == "noted":
            with self._lock:
                self._known.add(call_index)
                self._inquiries.pop(call_index, None)
        elif kind == "answer" and (inquiry := self._inquiries.get(call_index)):
            inquiry.answers[source] = Whereabouts(*values)

    def attend(self) -> None:
        """Report what has been answered, or is not; called now and then, by the progress thread."""
        with self._lock:
            due = [
                (call_index, inquiry)
                for call_index, inquiry in self._inquiries.items()
                if len(inquiry.answers) >= self._size - 1 or time.monotonic() - inquiry.asked_s > _ANSWER_LIMIT_S
            ]
            for call_index, _ in due:
                self._known.add(call_index)
                del self._inquiries[call_index]
        for call_index, inquiry in due:
            self._report(call_index, inquiry)

    def _report(self, call_index: int, inquiry: _Inquiry) -> None:
        if self._rank == _REPORTER:
            inquiry.answers[self._rank] = self._whereabouts()
            report = report_of_stall(inquiry.subject, call_index, inquiry.waited_s, self._size, inquiry.answers)
        else:
            report = f"{inquiry.subject}: waits for other ranks since {inquiry.waited_s:.0f} s; rank 0 does not answer"
        _log.warning("r%d/%d | %s", self._rank, self._size, report)
