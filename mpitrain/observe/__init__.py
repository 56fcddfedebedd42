"""What a job does and where it waits: counters, the timeline of all ranks, and reports of late ranks."""

from mpitrain.observe.counters import CommunicationClock, CommunicationCounters
from mpitrain.observe.messages import show_messages
from mpitrain.observe.recorder import TRANSFER, OperationTrace, Recorder
from mpitrain.observe.stalls import Whereabouts, report_of_stall, stack_of_thread
from mpitrain.observe.timeline import Timeline

__all__ = [
    "TRANSFER",
    "CommunicationClock",
    "CommunicationCounters",
    "OperationTrace",
    "Recorder",
    "Timeline",
    "Whereabouts",
    "report_of_stall",
    "show_messages",
    "stack_of_thread",
]
