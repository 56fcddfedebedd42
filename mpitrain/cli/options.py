"""How options are read that several commands have."""

from __future__ import annotations

import click

from mpitrain.bench.units import parse_nbytes

__all__ = ["parse_list_option", "parse_nbytes_option", "parse_sizes_option"]


def parse_nbytes_option(_context: click.Context, _option: click.Parameter, text: str) -> int:
    """Read the value of an option that is a number of bytes."""
    try:
        return parse_nbytes(text)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


def parse_sizes_option(_context: click.Context, _option: click.Parameter, text: str) -> tuple[int, int]:
    """Read the smallest and the largest of some numbers of bytes, such as 8:1G; or one number, which is both."""
    low, colon, high = text.partition(":")
    try:
        sizes = parse_nbytes(low), parse_nbytes(high if colon else low)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None
    if sizes[0] > sizes[1]:
        raise click.BadParameter(f"the smaller size comes first, got {text!r}; write such as 8:64M")
    return sizes


def parse_list_option(_context: click.Context, _option: click.Parameter, text: str) -> tuple[str, ...]:
    """Read words between commas, each once."""
    return tuple(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))
