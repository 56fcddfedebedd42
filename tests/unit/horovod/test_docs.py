"""docs/horovod.md against Horovod's public names and what is here."""

from __future__ import annotations

import inspect
import re
from functools import reduce
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

import mpitrain.torch as hvd
from mpitrain.aliases import ALIASES
from mpitrain.horovod.modules import MODULES

PAGE = (Path(__file__).parents[3] / "docs" / "horovod.md").read_text()

# What horovod.torch 0.28 exports, and the classes of its elastic states.
NAMES = """
    init shutdown is_initialized start_timeline stop_timeline
    size rank local_size local_rank cross_size cross_rank is_homogeneous
    mpi_threads_supported mpi_enabled mpi_built gloo_enabled gloo_built nccl_built ddl_built ccl_built cuda_built
    rocm_built
    Average Sum Adasum Min Max Product
    allreduce allreduce_ allreduce_async allreduce_async_
    grouped_allreduce grouped_allreduce_ grouped_allreduce_async grouped_allreduce_async_
    sparse_allreduce_async allgather allgather_async grouped_allgather grouped_allgather_async
    broadcast broadcast_ broadcast_async broadcast_async_ alltoall alltoall_async
    reducescatter reducescatter_async grouped_reducescatter grouped_reducescatter_async
    join barrier poll synchronize
    allgather_object broadcast_object broadcast_optimizer_state broadcast_parameters
    Compression DistributedOptimizer SyncBatchNorm ProcessSet HorovodInternalError
    global_process_set add_process_set remove_process_set
    elastic.run elastic.TorchState elastic.ElasticSampler elastic.State elastic.ObjectState
""".split()  # noqa: SIM905  (a list of so many strings hides which belong together)


def table(heading: str) -> list[list[str]]:
    """The rows of the first table below a heading, without its head."""
    section = PAGE.split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows[2:]]


ROWS = {row[0].strip("`"): row for row in table("Every public name")}


def test_the_table_has_every_public_name_once() -> None:
    assert [row[0].strip("`") for row in table("Every public name")] == NAMES
    assert {row[2] for row in ROWS.values()} <= {"same", "more"}


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_there_and_takes_the_arguments_of_the_table(name: str) -> None:
    found: Any = reduce(getattr, name.split("."), hvd)
    arguments = re.findall(r"`([^`]+)`", ROWS[name][1])
    if name == "Compression":
        assert all(hasattr(found, argument.removeprefix(".")) for argument in arguments)
        return
    if not arguments:
        return
    parameters = inspect.signature(found).parameters
    for argument in arguments:
        given, _, default = argument.partition("=")
        assert given in parameters
        if default:
            assert repr(parameters[given].default) == default
    # Horovod's order, so that they may be given by position.
    assert [argument.partition("=")[0] for argument in arguments] == list(parameters)[: len(arguments)]


def test_the_table_of_modules_is_what_can_be_imported() -> None:
    listed = {row[0].strip("`"): row[1].strip("`") for row in table("Modules")}
    assert listed == {name: source or "nothing but the next ones" for name, source in MODULES.items()}


def test_the_table_of_variables_is_what_sets_something() -> None:
    listed = {row[0].strip("`"): re.findall(r"`MPITRAIN_(\w+)`", row[1]) for row in table("Environment variables")}
    assert listed == {name: [setting.upper() for setting in alias.settings] for name, alias in ALIASES.items()}
