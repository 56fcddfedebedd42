"""How long is too long: a limit of a test says that something hangs, never that it is slow.

The machine may be busy with anything else, so what takes milliseconds at the desk may take many seconds there.
"""

from __future__ import annotations

__all__ = ["HANG_S"]

# Less than the time limit of a test, so that a hang is reported by who waits.
HANG_S = 150.0
