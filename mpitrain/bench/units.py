"""Sizes as people write them."""

from __future__ import annotations

__all__ = ["format_nbytes", "format_s", "parse_nbytes"]

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def parse_nbytes(text: str) -> int:
    """Read a number of bytes, such as 4096, 64K or 128M.

    Raises:
        ValueError: It is none, or not positive.
    """
    digits, unit = (text[:-1], text[-1].upper()) if text[-1:].isalpha() else (text, "")
    if not (digits.isascii() and digits.isdigit() and unit in _UNITS and int(digits)):
        raise ValueError(f"must be a number of bytes, got {text!r}; write 4096, 64K, 128M or 1G")
    return int(digits) * _UNITS[unit]


def format_nbytes(nbytes: int) -> str:
    """Write a size such as "64 KiB"."""
    for unit, factor in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if nbytes >= factor:
            return f"{nbytes / factor:.4g} {unit}"
    return f"{nbytes} B"


def format_s(seconds: float) -> str:
    """Write a time such as "64 us"."""
    for unit, factor in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= factor:
            return f"{seconds / factor:.4g} {unit}"
    return f"{seconds * 1e6:.4g} us"
