"""Results of benchmarks as files: what was measured, on what, and every figure that tables and plots are made of."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from mpitrain.bench.bandwidth import COLLECTIVES, algbw_bytes_per_s, busbw_bytes_per_s
from mpitrain.collectives.table import Shape

__all__ = [
    "FORMAT_VERSION",
    "CollectiveRun",
    "Results",
    "Row",
    "Setup",
    "TrainRow",
    "TrainRun",
    "read_results",
    "to_json",
]

FORMAT_VERSION = 1

_REMEDY = "pass files that `mpitrain bench ... --json FILE` has written"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setup:
    """What a benchmark ran on.

    Attributes:
        machine: Processor, cores and MPI library of rank 0.
        shape: Of the ranks.
        versions: Of what the figures depend on, by name.
        date: When it began, in UTC.
        settings: Those that differ from the defaults.
        segment_nbytes: See `mpitrain.config.Settings`.
    """

    machine: str
    shape: Shape
    versions: Mapping[str, str]
    date: str
    settings: Mapping[str, str]
    segment_nbytes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One side at one size.

    Attributes:
        dtype: Of the elements.
        op: How they are reduced; "" where they are only moved.
        nbytes: Size of the full buffer.
        count: Its elements.
        side: An algorithm, or the name of another library.
        memory: See `operation.Use`.
        iterations: Number of samples.
        repeats: Calls in each of them.
        median_s: Of the samples, as are the percentiles; each is the time of the slowest rank.
        p5_s: 5 % of the samples are below.
        p95_s: 95 % are below.
        wrong: Elements of all ranks' results that are wrong; -1 if that was not checked.
    """

    dtype: str
    op: str
    nbytes: int
    count: int
    side: str
    memory: str
    iterations: int
    repeats: int
    median_s: float
    p5_s: float
    p95_s: float
    wrong: int

    @property
    def label(self) -> str:
        """The side, and the memory where that is not the ordinary one."""
        return self.side if self.memory == "host" else f"{self.side}, {self.memory}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class CollectiveRun:
    """What `mpitrain bench <collective>` has measured.

    Attributes:
        collective: One of `COLLECTIVES`.
        in_place: See `operation.Use`, as for `persistent`.
        libraries: Sides that are other libraries.
        rows: By dtype, op and size, as they were measured.
    """

    setup: Setup
    collective: str
    in_place: bool
    persistent: bool
    libraries: Sequence[str]
    rows: Sequence[Row]

    def __post_init__(self) -> None:
        """Check what the figures are made of.

        Raises:
            ValueError: No such collective, or times that are none.
        """
        if self.collective not in COLLECTIVES:
            raise ValueError(f"collective: unknown, got {self.collective!r}; use one of {', '.join(COLLECTIVES)}")
        for row in self.rows:
            if not 0 < row.p5_s <= row.median_s <= row.p95_s or row.nbytes < 1:
                raise ValueError(f"row: times must be positive and ascend from p5 to p95, got {row}; measure again")

    def algbw_bytes_per_s(self, row: Row) -> float:
        """Return the algorithm bandwidth by the median; see `bandwidth`."""
        return algbw_bytes_per_s(row.nbytes, row.median_s)

    def busbw_bytes_per_s(self, row: Row) -> float:
        """Return the bus bandwidth by the median; see `bandwidth`."""
        return busbw_bytes_per_s(self.collective, row.nbytes, row.median_s, self.setup.shape.size)

    def derived(self, row: Row) -> dict[str, float]:
        """Return what follows from a row."""
        return {
            "algbw_bytes_per_s": self.algbw_bytes_per_s(row),
            "busbw_bytes_per_s": self.busbw_bytes_per_s(row),
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainRow:
    """Training steps of one model by one side.

    Attributes:
        model: Name of the model.
        num_parameters: Of the model.
        side: "alone" (each rank for itself), "mpitrain" or "DDP".
        batch: Samples per rank and step.
        iterations: Number of steps that were timed.
        median_s: Of the steps, as are the percentiles; each is the time of the slowest rank.
        p5_s: 5 % of the steps are below.
        p95_s: 95 % are below.
        one_rank_s: The step on one rank while the others are idle, the same for all sides of a model.
        exposed_s: How long, of a step, a rank was held up by communication, on average over ranks; None where that is
            not known.
        hidden_s: How long communication went on while nobody waited for it, as above.
        cpu: Cores that a rank kept busy, on average over ranks.
        memory_nbytes: By how much a rank's memory grew for model, optimizer and gradients; of the rank with the most.
    """

    model: str
    num_parameters: int
    side: str
    batch: int
    iterations: int
    median_s: float
    p5_s: float
    p95_s: float
    one_rank_s: float
    exposed_s: float | None
    hidden_s: float | None
    cpu: float
    memory_nbytes: int

    @property
    def efficiency(self) -> float:
        """Samples per second of all ranks, as a part of what as many single ranks would make."""
        return self.one_rank_s / self.median_s


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainRun:
    """What `mpitrain bench train` has measured."""

    setup: Setup
    rows: Sequence[TrainRow]

    def __post_init__(self) -> None:
        """Check what the figures are made of.

        Raises:
            ValueError: Times that are none.
        """
        for row in self.rows:
            if not 0 < row.p5_s <= row.median_s <= row.p95_s or row.one_rank_s <= 0:
                raise ValueError(f"row: times must be positive and ascend from p5 to p95, got {row}; measure again")

    def samples_per_s(self, row: TrainRow) -> float:
        """Return the samples of all ranks."""
        return row.batch * self.setup.shape.size / row.median_s

    def added_s(self, row: TrainRow) -> float:
        """Return by how much a step is longer than that of ranks which do not communicate."""
        alone = next((each for each in self.rows if each.model == row.model and each.side == "alone"), row)
        return row.median_s - alone.median_s

    def derived(self, row: TrainRow) -> dict[str, float]:
        """Return what follows from a row."""
        return {
            "samples_per_s": self.samples_per_s(row),
            "efficiency": row.efficiency,
            "added_s": self.added_s(row),
        }


Results: TypeAlias = CollectiveRun | TrainRun


def to_json(results: Results) -> str:
    """Return what `read_results` reads."""
    kind = "collective" if isinstance(results, CollectiveRun) else "train"
    data = {"mpitrain_bench": kind, "format": FORMAT_VERSION, **dataclasses.asdict(results)}
    return json.dumps(data, indent=1) + "\n"


def to_csv(results: Results) -> str:
    """Return a table: a line for each row, after a line of names."""
    shape = results.setup.shape
    fixed = {
        "benchmark": results.collective if isinstance(results, CollectiveRun) else "train",
        "ranks": shape.size,
        "nodes": shape.num_nodes,
    }
    derived: Any = results.derived
    lines = [{**fixed, **dataclasses.asdict(row), **derived(row)} for row in results.rows]
    text = io.StringIO()
    if lines:
        writer = csv.DictWriter(text, lines[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
    return text.getvalue()


def read_results(path: Path) -> Results:
    """Read a file.

    Raises:
        ValueError: It cannot be read, or holds something else; the message names the file.
    """
    try:
        return _parse(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise ValueError(f"results: cannot be read, got {error}; {_REMEDY}") from None
    except RecursionError:
        raise ValueError(f"results {path}: nested too deeply; {_REMEDY}") from None
    except ValueError as error:
        raise ValueError(f"results {path}: {error}; {_REMEDY}") from None


def _parse(data: Any) -> Results:
    if not isinstance(data, dict) or "mpitrain_bench" not in data:
        raise ValueError("not written by mpitrain bench")
    if data.get("format") != FORMAT_VERSION:
        raise ValueError(f"format: another one is needed, got {data.get('format')!r}; this is for {FORMAT_VERSION}")
    fields = {name: value for name, value in data.items() if name not in ("mpitrain_bench", "format")}
    is_train = data["mpitrain_bench"] == "train"
    rows = _checked(fields.get("rows"), "rows", list)
    row_kind: Any = TrainRow if is_train else Row
    fields["rows"] = tuple(_build(row_kind, row, "row") for row in rows)
    setup = _checked(fields.get("setup"), "setup", dict)
    shape = _build(Shape, setup.get("shape"), "shape")
    fields["setup"] = _build(Setup, {**setup, "shape": shape}, "setup")
    kind: Any = TrainRun if is_train else CollectiveRun
    results: Results = _build(kind, fields, "results")
    return results


def _build(kind: Any, data: Any, subject: str) -> Any:
    """Make a dataclass of a JSON object that has exactly its fields."""
    _checked(data, subject, dict)
    names = {field.name for field in dataclasses.fields(kind)}
    if set(data) != names:
        raise ValueError(f"{subject}: must have the fields {sorted(names)}, got {sorted(data)}")
    for field in dataclasses.fields(kind):
        _checked(data[field.name], f"{field.name} of {subject}", _TYPES.get(str(field.type)))
    return kind(**data)


_TYPES: dict[str, Any] = {
    "int": int,
    "float": (int, float),
    "float | None": (int, float, type(None)),
    "str": str,
    "bool": bool,
}


def _checked(value: Any, subject: str, kind: Any) -> Any:
    # A bool is an int in Python, and not in JSON.
    if kind is not None and (not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool)):
        name = kind.__name__ if isinstance(kind, type) else "float"
        raise ValueError(f"{subject}: must be {name}, got {str(value)[:40]!r}")
    return value
