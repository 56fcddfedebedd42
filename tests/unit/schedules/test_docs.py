from __future__ import annotations

from pathlib import Path

from mpitrain.schedules import ALGORITHMS, Algorithm

PAGE = Path(__file__).parents[3] / "docs" / "algorithms.md"


def row_of(algorithm: Algorithm) -> list[str]:
    return [
        algorithm.collective,
        f"`{algorithm.name}`",
        algorithm.rounds_formula,
        algorithm.volume_formula,
        algorithm.restrictions,
        algorithm.source,
    ]


def test_table_rows_are_those_of_the_registry() -> None:
    # What is no schedule has a table of its own, further down.
    first_table = PAGE.read_text(encoding="utf-8").split("\n|", 1)[1].split("\n\n", 1)[0]
    lines = [line for line in f"|{first_table}".splitlines() if line.startswith("| ")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    header, *rest = rows
    assert header == ["collective", "algorithm", "rounds", "bytes sent / n", "requires", "source"]
    assert rest == [row_of(algorithm) for table in ALGORITHMS.values() for algorithm in table.values()]
