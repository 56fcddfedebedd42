"""Makes one page of results: plots, what they were measured on, and all figures; complete in itself."""

from __future__ import annotations

import dataclasses
import importlib.resources
import statistics
from collections.abc import Iterator, Mapping, Sequence

import jinja2

import mpitrain
from mpitrain.bench.fit import error_of, fit_cluster, observations_of
from mpitrain.bench.plots import Curve, Plot, bar_plot, size_plot
from mpitrain.bench.results import CollectiveRun, Results, Row, Setup, TrainRow, TrainRun
from mpitrain.bench.units import format_nbytes, format_s

__all__ = ["Section", "render_page", "sections_of"]

_GB = 1e9
_MS = 1e3
_TEMPLATE = "report.html.j2"


@dataclasses.dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
        title: Its heading.
        notes: Short sentences below it.
        plots: Side by side, where there is room.
        columns: Headings of the table of all figures.
        cells: Its lines.
    """

    title: str
    notes: Sequence[str]
    plots: Sequence[Plot]
    columns: Sequence[str] = ()
    cells: Sequence[Sequence[str]] = ()


def render_page(all_results: Sequence[Results], sections: Sequence[Section], title: str) -> str:
    """Return the HTML document."""
    source = importlib.resources.files("mpitrain.bench").joinpath(_TEMPLATE).read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    setups = list(dict.fromkeys(_describe(results.setup) for results in all_results))
    return environment.from_string(source).render(
        title=title, setups=setups, sections=sections, version=mpitrain.__version__
    )


def sections_of(all_results: Sequence[Results]) -> list[Section]:
    """Return the parts of the page, for results of any number of runs."""
    runs = sorted(
        (each for each in all_results if isinstance(each, CollectiveRun)),
        key=lambda run: (run.collective, run.setup.shape.size, run.setup.date),
    )
    sections = []
    for number, run in enumerate(runs):
        for dtype, op in dict.fromkeys((row.dtype, row.op) for row in run.rows):
            rows = [row for row in run.rows if (row.dtype, row.op) == (dtype, op)]
            name = f"{run.collective}-{run.setup.shape.size}-{number}-{dtype}{op and '-'}{op}"
            sections.append(_collective_section(run, rows, name))
    sections += _scaling_sections(runs)
    trained = sorted((each for each in all_results if isinstance(each, TrainRun)), key=lambda run: run.setup.shape.size)
    sections += [_training_section(run, number) for number, run in enumerate(trained)]
    if len({run.setup.shape.size for run in trained}) > 1:
        sections.append(_training_scaling(trained))
    return sections


def _describe(setup: Setup) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in setup.versions.items())
    settings = ", ".join(f"{name}={value}" for name, value in setup.settings.items())
    return f"{_ranks(setup)}: {setup.machine}. {versions}. {settings + '. ' if settings else ''}{setup.date}"


def _ranks(setup: Setup) -> str:
    shape = setup.shape
    nodes = "1 node" if shape.num_nodes == 1 else f"{shape.num_nodes} nodes"
    return f"{shape.size} ranks on {nodes}"


def _what(run: CollectiveRun, row: Row) -> str:
    form = "in place" if run.in_place else "new arrays"
    return f"{run.collective}, {row.dtype}{' ' * bool(row.op)}{row.op}, {form}{', persistent' * run.persistent}"


def _collective_section(run: CollectiveRun, rows: Sequence[Row], name: str) -> Section:
    labels = list(dict.fromkeys(row.label for row in rows))
    libraries = set(run.libraries)
    by_label = {label: {row.nbytes: row for row in rows if row.label == label} for label in labels}

    def curves(value: Mapping[str, Mapping[int, float]]) -> list[Curve]:
        return [
            Curve(label, points, is_library=label in libraries, is_variant="," in label)
            for label, points in value.items()
            if points
        ]

    times = [
        Curve(
            label,
            {nbytes: row.median_s for nbytes, row in by_size.items()},
            {nbytes: (row.p5_s, row.p95_s) for nbytes, row in by_size.items()},
            is_library=label in libraries,
            is_variant="," in label,
        )
        for label, by_size in by_label.items()
    ]
    rates = {
        label: {nbytes: run.busbw_bytes_per_s(row) / _GB for nbytes, row in by_size.items()}
        for label, by_size in by_label.items()
    }
    plots = [
        size_plot(
            f"{name}-time",
            "Time of a call: median and, shaded, from the 5th to the 95th percentile. Lower is better.",
            times,
            y_label="time",
            is_log=True,
            is_time=True,
        ),
        size_plot(f"{name}-busbw", "Bus bandwidth. Higher is better.", curves(rates), y_label="busbw (GB/s)"),
    ]
    rival = next((label for label in ("MPI", "native", *run.libraries) if label in by_label), None)
    if rival is not None:
        base = by_label[rival]
        ratios = {
            label: {n: base[n].median_s / row.median_s for n, row in by_size.items() if n in base}
            for label, by_size in by_label.items()
            if label != rival
        }
        what = "MPI" if rival == "MPI" else rival
        plots.append(
            size_plot(
                f"{name}-speedup",
                f"How many times as fast as {what}. Above the line is faster.",
                curves(ratios),
                y_label=f"speed-up against {what}",
                is_log=True,
                base=1.0,
            )
        )
    notes = ["Times are those of the slowest rank."]
    wrong = sorted({row.label for row in rows if row.wrong > 0})
    if wrong:
        notes.append(f"Wrong results: {', '.join(wrong)}.")
    if prediction := _prediction(run, rows, name):
        plot, note = prediction
        plots.append(plot)
        notes.append(note)
    columns = ("size", "side", "time", "p5", "p95", "algbw GB/s", "busbw GB/s", "wrong")
    cells = [
        (
            format_nbytes(row.nbytes),
            row.label,
            *(format_s(seconds) for seconds in (row.median_s, row.p5_s, row.p95_s)),
            *(f"{rate / _GB:.3f}" for rate in (run.algbw_bytes_per_s(row), run.busbw_bytes_per_s(row))),
            "not checked" if row.wrong < 0 else str(row.wrong),
        )
        for row in rows
    ]
    return Section(f"{_what(run, rows[0])}: {_ranks(run.setup)}", notes, plots, columns, cells)


def _prediction(run: CollectiveRun, rows: Sequence[Row], name: str) -> tuple[Plot, str] | None:
    """Return the model beside the measurement, where there is a model."""
    observations = observations_of(dataclasses.replace(run, rows=rows))
    if not observations:
        return None
    cluster = fit_cluster(observations)
    curves = []
    for algorithm in dict.fromkeys(each.algorithm for each in observations):
        members = [each for each in observations if each.algorithm == algorithm]
        curves.append(Curve(algorithm, {each.nbytes: each.measured_s for each in members}))
        predicted = {each.nbytes: each.predicted_s(cluster) for each in members}
        curves.append(Curve(algorithm, predicted, is_model=True))
    plot = size_plot(
        f"{name}-model",
        "Measurement (marks) and the model that was fitted to it (dashes).",
        curves,
        y_label="time",
        is_log=True,
        is_time=True,
    )
    errors = [abs(error_of(each, cluster)) for each in observations]
    return plot, f"The fitted model is off by {statistics.median(errors):.0%} (median), {max(errors):.0%} at worst."


def _scaling_sections(runs: Sequence[CollectiveRun]) -> Iterator[Section]:
    """Yield how bandwidth changes with the number of ranks, where it was measured for several."""
    groups: dict[str, dict[int, dict[tuple[str, int], float]]] = {}
    for run in runs:
        for row in run.rows:
            by_size = groups.setdefault(_what(run, row), {}).setdefault(run.setup.shape.size, {})
            by_size[row.label, row.nbytes] = run.busbw_bytes_per_s(row) / _GB
    for number, (what, by_ranks) in enumerate(groups.items()):
        common = set.intersection(*({nbytes for _, nbytes in values} for values in by_ranks.values()))
        if len(by_ranks) < 2 or not common:
            continue
        nbytes = max(common)
        fewest = min(by_ranks)
        labels = list(dict.fromkeys(label for values in by_ranks.values() for label, _ in values))
        rates = {
            label: {ranks: values[label, nbytes] for ranks, values in by_ranks.items() if (label, nbytes) in values}
            for label in labels
        }
        rates = {label: points for label, points in rates.items() if len(points) > 1}
        libraries = {label for run in runs for label in run.libraries}
        curves = [
            Curve(label, points, is_library=label in libraries, is_variant="," in label)
            for label, points in rates.items()
        ]
        parts = [
            dataclasses.replace(
                curve, points={ranks: rate / curve.points[fewest] for ranks, rate in curve.points.items()}
            )
            for curve in curves
            if fewest in curve.points
        ]
        size = format_nbytes(nbytes)
        yield Section(
            f"Scaling: {what}",
            [f"Buffers of {size}. A busbw that stays the same is perfect scaling."],
            [
                size_plot(
                    f"scaling-{number}-busbw",
                    f"Bus bandwidth at {size}.",
                    curves,
                    y_label="busbw (GB/s)",
                    x_label="ranks",
                ),
                size_plot(
                    f"scaling-{number}-efficiency",
                    f"Scaling efficiency: bus bandwidth as a part of that of {fewest} ranks.",
                    parts,
                    y_label="efficiency",
                    x_label="ranks",
                    base=1.0,
                ),
            ],
        )


def _training_section(run: TrainRun, number: int) -> Section:
    models = list(dict.fromkeys(row.model for row in run.rows))

    def bars(value: Mapping[TrainRow, float]) -> dict[str, dict[str, float]]:
        return {
            model: {row.side: value[row] for row in run.rows if row.model == model and row in value} for model in models
        }

    name = f"train-{run.setup.shape.size}-{number}"
    parts = {
        row.model: {"exposed": row.exposed_s * _MS, "hidden": row.hidden_s * _MS}
        for row in run.rows
        if row.exposed_s is not None and row.hidden_s is not None
    }
    plots = [
        bar_plot(
            f"{name}-samples",
            "Samples per second of all ranks. Higher is better.",
            bars({row: run.samples_per_s(row) for row in run.rows}),
            y_label="samples/s",
        ),
        bar_plot(
            f"{name}-efficiency",
            "Scaling efficiency: samples per second as a part of what as many single ranks would make.",
            bars({row: row.efficiency for row in run.rows}),
            y_label="efficiency",
            base=1.0,
        ),
    ]
    if parts:
        plots.append(
            bar_plot(
                f"{name}-communication",
                "Communication of mpitrain in a step: what was waited for (exposed), and what was not (hidden).",
                parts,
                y_label="ms per step",
            )
        )
    columns = (
        *("model", "parameters", "side", "batch", "samples/s", "step", "p5", "p95", "efficiency", "added"),
        *("exposed", "hidden", "cores", "memory"),
    )
    cells = [
        (
            row.model,
            f"{row.num_parameters / 1e6:.1f} M",
            row.side,
            str(row.batch),
            f"{run.samples_per_s(row):.1f}",
            *(format_s(float(f"{seconds:.4g}")) for seconds in (row.median_s, row.p5_s, row.p95_s)),
            f"{row.efficiency:.1%}",
            *("" if s is None else f"{s * _MS:.1f} ms" for s in (run.added_s(row), row.exposed_s, row.hidden_s)),
            f"{row.cpu:.2f}",
            format_nbytes(row.memory_nbytes),
        )
        for row in run.rows
    ]
    notes = ["Each side makes steps in turn with the others. “alone” does not communicate."]
    return Section(f"Training steps: {_ranks(run.setup)}", notes, plots, columns, cells)


def _training_scaling(runs: Sequence[TrainRun]) -> Section:
    points: dict[str, dict[int, float]] = {}
    for run in runs:
        for row in run.rows:
            if row.side != "alone":
                points.setdefault(f"{row.model}, {row.side}", {})[run.setup.shape.size] = row.efficiency
    plot = size_plot(
        "train-scaling",
        "Scaling efficiency by number of ranks: against one rank alone on the machine.",
        [Curve(label, by_ranks) for label, by_ranks in points.items()],
        y_label="efficiency",
        x_label="ranks",
        base=1.0,
    )
    return Section("Scaling: training steps", ["A line at 1 is perfect scaling."], [plot])
