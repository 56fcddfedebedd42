"""What a check finds: one line, and what to do where something is wrong."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Literal

__all__ = ["Finding", "Status", "can_train"]

Status = Literal["ok", "warning", "failure"]


@dataclasses.dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        name: What was looked at.
        status: "failure" keeps training from running, "warning" makes it slower or may surprise.
        text: What was found.
        remedy: What to do; "" if all is well.
    """

    name: str
    status: Status
    text: str
    remedy: str = ""


def can_train(findings: Iterable[Finding]) -> bool:
    """Whether none of them keeps training from running."""
    return all(finding.status != "failure" for finding in findings)
