"""The error of a proof that fails."""

from __future__ import annotations

__all__ = ["ProofError"]


class ProofError(AssertionError):
    """A schedule is wrong; the message says where: rank, round, peer, chunk."""
