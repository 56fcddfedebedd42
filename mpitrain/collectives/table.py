"""What `mpitrain tune` has measured: the fastest algorithm by collective, bytes, group shape and use.

Terms: the *shape* of a group is its nodes and the ranks on them. A *use* is how an operation is called: blocking or in
the background, on an ordinary array or on one in shared memory. The *steps* of a combination are pairs of a
size in bytes up to which an algorithm is to be taken, and the algorithm; the last size may be None, for all above.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import functools
from collections.abc import Iterable, Mapping
from typing import Any

from mpitrain.collectives.selection import DIRECT, HIERARCHICAL, Available, known_algorithms
from mpitrain.comm import Topology
from mpitrain.schedules import ALGORITHMS

__all__ = ["FORMAT_VERSION", "Key", "Shape", "Steps", "Table"]

FORMAT_VERSION = 1

Steps = tuple[tuple[int | None, str], ...]


@dataclasses.dataclass(frozen=True, slots=True, order=True)
class Shape:
    """How many ranks are on how many nodes.

    Attributes:
        num_nodes: Number of nodes.
        smallest: Ranks of the node that has the fewest.
        largest: Ranks of the node that has the most.
        size: Ranks of all nodes.
    """

    num_nodes: int
    smallest: int
    largest: int
    size: int

    def __post_init__(self) -> None:
        """Check that there are such groups."""
        lowest = self.smallest * (self.num_nodes - 1) + self.largest
        highest = self.smallest + self.largest * (self.num_nodes - 1)
        if self.num_nodes < 1 or not 1 <= self.smallest <= self.largest or not lowest <= self.size <= highest:
            raise ValueError(f"shape: no group can have it, got {self!r}; count the ranks of each node")

    @classmethod
    def of(cls, topology: Topology) -> Shape:
        """Return the shape of the ranks of a communicator; the same on every rank."""
        counts = [len(node) for node in topology.nodes]
        return cls(len(counts), min(counts), max(counts), sum(counts))

    def __str__(self) -> str:
        """Such as "2 x 4" or, where nodes differ, "3 x 2-4, 9 ranks"."""
        if self.smallest == self.largest:
            return f"{self.num_nodes} x {self.largest}"
        return f"{self.num_nodes} x {self.smallest}-{self.largest}, {self.size} ranks"


@dataclasses.dataclass(frozen=True, slots=True, order=True)
class Key:
    """What a measurement is good for.

    Attributes:
        collective: A key of `ALGORITHMS`.
        shape: Of the group.
        blocking: Whether the caller waits, or the progress thread does the work.
        in_window: Whether the array lies in memory that the ranks of a node share.
    """

    collective: str
    shape: Shape
    blocking: bool
    in_window: bool = False


@dataclasses.dataclass(frozen=True)
class Table:
    """Measured choices of one machine.

    Attributes:
        fingerprint: Of the machine and its MPI library.
        versions: Of what the measurements depend on, by name.
        date: When the last of them was made.
        choices: The steps, by what they are good for.
    """

    fingerprint: str
    versions: Mapping[str, str]
    date: dt.date
    choices: Mapping[Key, Steps]

    def __post_init__(self) -> None:
        """Check the steps, so that nothing that has been constructed fails later.

        Raises:
            ValueError: Unknown collective or algorithm, sizes that do not ascend, or no steps.
        """
        for key, steps in self.choices.items():
            _check_steps(key.collective, steps)

    def lookup(
        self, collective: str, nbytes: int, shape: Shape, *, blocking: bool, in_window: bool = False
    ) -> str | None:
        """Return the algorithm to take for a full buffer of so many bytes; None where nothing was measured."""
        for limit, algorithm in self.choices.get(Key(collective, shape, blocking, in_window), ()):
            if limit is None or nbytes <= limit:
                return algorithm
        return None

    def updated(self, newer: Table) -> Table:
        """Return the newer table with what only this one has; both are of one machine."""
        return dataclasses.replace(newer, choices={**self.choices, **newer.choices})

    def to_json(self) -> dict[str, Any]:
        """Return what `from_json` reads."""
        return {
            "format": FORMAT_VERSION,
            "fingerprint": self.fingerprint,
            "versions": dict(self.versions),
            "date": self.date.isoformat(),
            "choices": [
                {**dataclasses.asdict(key), "steps": [list(step) for step in steps]}
                for key, steps in sorted(self.choices.items(), key=lambda choice: choice[0])
            ],
        }

    @classmethod
    def from_json(cls, data: Any) -> Table:
        """Make a table of what `to_json` returned.

        Raises:
            ValueError: It is anything else; the message says what.
        """
        fields = _fields(data, "table", format=int, fingerprint=str, versions=dict, date=str, choices=list)
        if fields["format"] != FORMAT_VERSION:
            raise ValueError(f"format: another one is needed, got {fields['format']}; this is for {FORMAT_VERSION}")
        for name, version in fields["versions"].items():
            _check_type(f"version of {name}", version, str)
        choices: dict[Key, Steps] = {}
        for row in fields["choices"]:
            key, steps = _parse_choice(row)
            if key in choices:
                raise ValueError(f"choices: two for the same, got {key} again; remove one")
            choices[key] = steps
        date = dt.date.fromisoformat(fields["date"])
        return cls(fields["fingerprint"], fields["versions"], date, choices)


def _parse_choice(row: Any) -> tuple[Key, Steps]:
    fields = _fields(row, "choice", collective=str, shape=dict, blocking=bool, in_window=bool, steps=list)
    shape = _fields(fields["shape"], "shape", num_nodes=int, smallest=int, largest=int, size=int)
    key = Key(fields["collective"], Shape(**shape), fields["blocking"], fields["in_window"])
    steps: list[tuple[int | None, str]] = []
    for step in fields["steps"]:
        _check_type("step", step, list)
        if len(step) != 2:
            raise ValueError(f"step: must be a size and an algorithm, got {step!r}; measure again")
        limit, algorithm = step
        if limit is not None:
            _check_type("size of a step", limit, int)
        _check_type("algorithm of a step", algorithm, str)
        steps.append((limit, algorithm))
    return key, tuple(steps)


def _check_steps(collective: str, steps: Steps) -> None:
    if collective not in ALGORITHMS:
        raise ValueError(f"collective: unknown, got {collective!r}; use one of {', '.join(ALGORITHMS)}")
    if not steps:
        raise ValueError(f"steps of {collective}: need at least one, got none; measure again")
    known = _names(collective)
    previous = -1
    for index, (limit, algorithm) in enumerate(steps):
        if algorithm not in known:
            raise ValueError(f"algorithm of {collective}: unknown, got {algorithm!r}; use one of {', '.join(known)}")
        is_last = index == len(steps) - 1
        if (limit is None and not is_last) or (limit is not None and limit <= previous):
            raise ValueError(f"steps of {collective}: sizes must ascend, got {limit} after {previous}; measure again")
        previous = previous if limit is None else limit


@functools.cache
def _names(collective: str) -> tuple[str, ...]:
    """Return the algorithms that any group may have."""
    names: Iterable[str] = (
        name for shared in (DIRECT, HIERARCHICAL) for name in known_algorithms(collective, Available(True, shared))
    )
    return tuple(dict.fromkeys(name for name in names if name != "auto"))


def _fields(data: Any, subject: str, **types: type) -> dict[str, Any]:
    """Return a JSON object that has exactly these fields."""
    _check_type(subject, data, dict)
    if set(data) != set(types):
        raise ValueError(f"{subject}: must have the fields {sorted(types)}, got {sorted(data)}; measure again")
    for name, kind in types.items():
        _check_type(f"{name} of {subject}", data[name], kind)
    return dict(data)


def _check_type(subject: str, value: Any, kind: type) -> None:
    # A bool is an int in Python, and not in JSON.
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ValueError(f"{subject}: must be {kind.__name__}, got {value!r}; measure again")
