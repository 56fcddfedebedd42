"""What a job does and where it waits: counters, the timeline of all ranks, and reports of late ranks."""

from mpitrain.observe.counters import CommunicationClock, CommunicationCounters, Traffic
from mpitrain.observe.messages import show_messages

__all__ = ["CommunicationClock", "CommunicationCounters", "Traffic", "show_messages"]
