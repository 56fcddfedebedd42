from __future__ import annotations

import re
from pathlib import Path

import click

from mpitrain.bench.rivals import RIVALS
from mpitrain.cli import bench_tables
from mpitrain.cli.commands import commands

PAGE = (Path(__file__).parents[3] / "docs" / "benchmarks.md").read_text(encoding="utf-8")


def test_every_column_is_explained():
    columns = {*bench_tables._COLUMNS.split(), *bench_tables._TRAIN_COLUMNS} - {"model", "batch"}
    explained = {
        name for row in re.findall(r"^\| (`.*?) \|", PAGE, re.MULTILINE) for name in re.findall(r"`(.*?)`", row)
    }
    assert columns <= explained


def test_options_that_are_named_exist():
    known: set[str] = set()
    groups: list[click.Command] = [commands]
    while groups:
        group = groups.pop()
        known |= {name for option in group.params for name in (*option.opts, *option.secondary_opts)}
        groups += getattr(group, "commands", {}).values()
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", PAGE))
    assert named - known <= {"--help", "--bind-to"}


def test_libraries_are_named():
    assert all(re.search(name, PAGE, re.IGNORECASE) for name in RIVALS)
