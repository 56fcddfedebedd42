"""The command `mpitrain`; importing it starts nothing, and needs neither click nor rich."""

from __future__ import annotations

__all__ = ["main"]


def main() -> None:
    """Run the command line of this process and end it.

    Raises:
        ImportError: click or rich is missing.
    """
    try:
        import click
        import rich
    except ImportError as error:
        raise ImportError(f"mpitrain command: a package is missing, got {error}; pip install mpitrain[cli]") from error
    del click, rich
    from mpitrain.cli.commands import run

    run()
