"""Named operations, as in Horovod: ranks start them in any order and negotiate which run next."""

from mpitrain.negotiation.negotiator import Negotiator

__all__ = ["Negotiator"]
