"""The tables of `mpitrain bench`: a line for each side at each size, as it is measured, easy to read and to parse."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mpitrain.bench.results import CollectiveRun, Row, Setup, TrainRow, TrainRun

__all__ = ["collective_heading", "collective_lines", "setup_lines", "training_heading", "training_lines"]

_GB = 1e9
_FORMAT = "{:>12} {:>11}  {:<26} {:>10} {:>10} {:>10} {:>8} {:>8} {:>7}"
_COLUMNS = _FORMAT.format("size", "count", "side", "time", "p5", "p95", "algbw", "busbw", "#wrong")
_UNITS = _FORMAT.format("(B)", "(elements)", "", "(us)", "(us)", "(us)", "(GB/s)", "(GB/s)", "")

_TRAIN_FORMAT = "{:<8} {:<10} {:>6} {:>10} {:>9} {:>9} {:>9} {:>10} {:>9} {:>9} {:>9} {:>6} {:>8} {:>7}"
_TRAIN_COLUMNS = (
    *("model", "side", "batch", "samples/s", "step", "p5", "p95", "efficiency", "added", "exposed", "hidden"),
    *("cores", "memory", "vs DDP"),
)
_TRAIN_UNITS = ("", "", "", "", "(ms)", "(ms)", "(ms)", "", "(ms)", "(ms)", "(ms)", "", "(MiB)", "")


def setup_lines(setup: Setup) -> Iterator[str]:
    """Yield what was measured on, as comments."""
    shape = setup.shape
    nodes = "1 node" if shape.num_nodes == 1 else f"{shape.num_nodes} nodes ({shape})"
    yield f"# {shape.size} ranks on {nodes}: {setup.machine}"
    yield "# " + ", ".join(f"{name} {version}" for name, version in setup.versions.items())
    if setup.settings:
        yield "# settings: " + ", ".join(f"{name}={value}" for name, value in setup.settings.items())


def collective_heading(run: CollectiveRun, dtype: str, op: str) -> Iterator[str]:
    """Yield what stands above the lines of one dtype and reduction."""
    form = "in place" if run.in_place else "new arrays"
    how = f"{form}, persistent plans" if run.persistent else form
    yield f"# {run.collective}: {dtype}{' ' * bool(op)}{op}, {how}"
    yield from setup_lines(run.setup)
    yield "# time: median of the slowest rank; p5, p95: percentiles; GB/s: 10^9 bytes per second"
    versus = "".join(f" {'vs ' + name:>8}" for name in run.libraries)
    yield f"#{_COLUMNS[1:]}{versus}"
    yield f"#{_UNITS[1:]}"


def collective_lines(run: CollectiveRun, rows: Sequence[Row]) -> Iterator[str]:
    """Yield the lines of the sides at one size."""
    rivals_s = {row.side: row.median_s for row in rows if row.side in run.libraries}
    for row in rows:
        times = [f"{seconds * 1e6:.2f}" for seconds in (row.median_s, row.p5_s, row.p95_s)]
        rates = [f"{rate / _GB:.3f}" for rate in (run.algbw_bytes_per_s(row), run.busbw_bytes_per_s(row))]
        wrong = "-" if row.wrong < 0 else str(row.wrong)
        versus = "".join(
            f" {rivals_s[name] / row.median_s:>7.2f}x" if name in rivals_s else f" {'-':>8}" for name in run.libraries
        )
        yield _FORMAT.format(row.nbytes, row.count, row.label, *times, *rates, wrong) + versus


def training_heading(run: TrainRun) -> Iterator[str]:
    """Yield what stands above the lines of training steps."""
    yield "# training steps of synthetic models"
    yield from setup_lines(run.setup)
    yield "# step: median of the slowest rank; efficiency: against one rank alone on the machine; added: to a step"
    yield "# without communication; exposed, hidden: communication that was waited for, and that was not"
    yield _TRAIN_FORMAT.format(*_TRAIN_COLUMNS)
    yield _TRAIN_FORMAT.format(*_TRAIN_UNITS)


def training_lines(run: TrainRun, rows: Sequence[TrainRow]) -> Iterator[str]:
    """Yield the lines of the sides of one model."""
    ddp_s = next((row.median_s for row in rows if row.side == "DDP"), None)
    for row in rows:
        versus = "-" if ddp_s is None else f"{ddp_s / row.median_s:.2f}x"
        step = [_milliseconds(seconds) for seconds in (row.median_s, row.p5_s, row.p95_s)]
        parts = [_milliseconds(seconds) for seconds in (run.added_s(row), row.exposed_s, row.hidden_s)]
        rate = f"{run.samples_per_s(row):.1f}"
        memory = f"{row.memory_nbytes / (1 << 20):.0f}"
        yield _TRAIN_FORMAT.format(
            row.model,
            row.side,
            row.batch,
            rate,
            *step,
            f"{row.efficiency:.1%}",
            *parts,
            f"{row.cpu:.2f}",
            memory,
            versus,
        )


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:.2f}"
