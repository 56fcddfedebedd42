"""How options are read that several commands have."""

from __future__ import annotations

import click

from mpitrain.bench.units import parse_nbytes

__all__ = ["parse_nbytes_option"]


def parse_nbytes_option(_context: click.Context, _option: click.Parameter, text: str) -> int:
    """Read the value of an option that is a number of bytes."""
    try:
        return parse_nbytes(text)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None
