"""Results of benchmarks by hand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mpitrain.bench.results import CollectiveRun, Row, Setup, TrainRow, TrainRun
from mpitrain.collectives.table import Shape


def make_setup(num_nodes: int = 1, per_node: int = 2, **changes: Any) -> Setup:
    fields = {
        "machine": "processor, 2 cores, MPI 1.0",
        "shape": Shape(num_nodes, per_node, per_node, num_nodes * per_node),
        "versions": {"mpitrain": "0.1.0", "MPI": "1.0"},
        "date": "2026-01-02T03:04:05+00:00",
        "settings": {},
        "segment_nbytes": 1 << 19,
    }
    return Setup(**{**fields, **changes})


def make_row(side: str, nbytes: int, median_s: float, **changes: Any) -> Row:
    fields = {
        "dtype": "float32",
        "op": "sum",
        "nbytes": nbytes,
        "count": nbytes // 4,
        "side": side,
        "memory": "host",
        "iterations": 5,
        "repeats": 1,
        "median_s": median_s,
        "p5_s": median_s * 0.9,
        "p95_s": median_s * 1.2,
        "wrong": 0,
    }
    return Row(**{**fields, **changes})


def make_run(times_s: Mapping[str, Mapping[int, float]], **changes: Any) -> CollectiveRun:
    """Make a run of times by side and size."""
    sizes = sorted({nbytes for by_size in times_s.values() for nbytes in by_size})
    rows = tuple(
        make_row(side, nbytes, by_size[nbytes])
        for nbytes in sizes
        for side, by_size in times_s.items()
        if nbytes in by_size
    )
    fields = {
        "setup": make_setup(),
        "collective": "allreduce",
        "in_place": True,
        "persistent": False,
        "libraries": ("MPI",) if "MPI" in times_s else (),
        "rows": rows,
    }
    return CollectiveRun(**{**fields, **changes})


def make_train_run(**changes: Any) -> TrainRun:
    """Make a run of one model: 0.1 s on one rank, 0.11 s alone among others, 0.12 s and 0.15 s in step."""
    common = {
        "model": "mlp",
        "num_parameters": 1000,
        "batch": 8,
        "iterations": 5,
        "one_rank_s": 0.1,
        "cpu": 0.9,
        "memory_nbytes": 1 << 20,
    }
    rows = tuple(
        TrainRow(
            side=side,
            median_s=median_s,
            p5_s=median_s * 0.9,
            p95_s=median_s * 1.1,
            exposed_s=0.004 if side == "mpitrain" else None,
            hidden_s=0.02 if side == "mpitrain" else None,
            **common,
        )
        for side, median_s in (("alone", 0.11), ("mpitrain", 0.12), ("DDP", 0.15))
    )
    return TrainRun(**{"setup": make_setup(), "rows": rows, **changes})
