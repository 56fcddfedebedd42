"""Collective algorithms as data: what each rank sends and receives, round by round."""

from __future__ import annotations

from mpitrain.schedules.algorithm import Algorithm
from mpitrain.schedules.draw import draw_svg, draw_text
from mpitrain.schedules.network import Network
from mpitrain.schedules.price import Price, price
from mpitrain.schedules.prove import Proof, ProofError, prove
from mpitrain.schedules.registry import ALGORITHMS, find_algorithm
from mpitrain.schedules.rounds import Receive, Round, Send
from mpitrain.schedules.segments import best_num_segments

__all__ = [
    "ALGORITHMS",
    "Algorithm",
    "Network",
    "Price",
    "Proof",
    "ProofError",
    "Receive",
    "Round",
    "Send",
    "best_num_segments",
    "draw_svg",
    "draw_text",
    "find_algorithm",
    "price",
    "prove",
]
