"""What mpitrain says through `logging`."""

from __future__ import annotations

import logging

__all__ = ["show_messages"]


def show_messages(level: str) -> None:
    """Show the messages of mpitrain from a level on, on standard error unless the program logs to somewhere else.

    Args:
        level: Such as "info"; "" leaves everything as the program has it.
    """
    if not level:
        return
    logger = logging.getLogger("mpitrain")
    logger.setLevel(level.upper())
    if not logger.hasHandlers():
        logger.addHandler(logging.StreamHandler())
