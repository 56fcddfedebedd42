"""The results of scripts/check_gpu: one JSON, and the table that people read."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gpu.limits import share_of_limit
from gpu.synchronizations import DEVICE_WIDE

__all__ = ["LEAST_SHARE", "failures_of", "merge", "table_of"]

LEAST_SHARE = 0.8
"""Part of the limit that each path with one must reach."""
_MIB = 1 << 20
_COLUMNS = ("ranks", "path", "MiB", "ms", "limit, ms", "of the limit")


def merge(folder: Path) -> dict[str, Any]:
    """Return what the parts have written to `folder`, in the order of their names.

    Each file holds a part of the result under names of its own; lists under the same name are joined.
    """
    merged: dict[str, Any] = {}
    for path in sorted(folder.glob("*.json")):
        for name, value in json.loads(path.read_text(encoding="utf-8")).items():
            if isinstance(value, list):
                merged.setdefault(name, []).extend(value)
            else:
                merged[name] = value
    return merged


def failures_of(result: Mapping[str, Any]) -> list[str]:
    """Return, in words, what is not as it must be."""
    failures = [
        f"{part['name']} ended with status {part['status']}" for part in result.get("parts", []) if part["status"]
    ]
    for row in result.get("rows", []):
        if row["limit_s"] is None:
            continue
        share = share_of_limit(row["limit_s"], row["time_s"])
        if share < LEAST_SHARE:
            failures.append(f"{row['path']} on {row['ranks']} ranks reached {share:.0%} of its limit")
    failures += [
        f"training steps on {profile['ranks']} ranks waited {profile['waits'][DEVICE_WIDE]} times for the whole device"
        for profile in result.get("profiles", [])
        if profile["waits"][DEVICE_WIDE]
    ]
    return failures


def table_of(rows: Iterable[Mapping[str, Any]]) -> str:
    """Return the measurements as lines of text; a limit that is not known is a dash."""
    cells: list[Sequence[str]] = [_COLUMNS]
    for row in rows:
        limit_s = row["limit_s"]
        cells.append(
            (
                str(row["ranks"]),
                row["path"],
                f"{row['nbytes'] / _MIB:g}",
                f"{1e3 * row['time_s']:.3f}",
                "-" if limit_s is None else f"{1e3 * limit_s:.3f}",
                "-" if limit_s is None else f"{share_of_limit(limit_s, row['time_s']):.0%}",
            )
        )
    widths = [max(len(line[column]) for line in cells) for column in range(len(_COLUMNS))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells)
