from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import sys
from collections import Counter
from fractions import Fraction
from pathlib import Path

import pytest

import mpitrain.schedules
from mpitrain.schedules import ALGORITHMS, Algorithm, Round, find_algorithm

ALL = [algorithm for row in ALGORITHMS.values() for algorithm in row.values()]
NAMES = [algorithm.qualified_name for algorithm in ALL]
by_name = pytest.mark.parametrize("algorithm", ALL, ids=NAMES)


def test_files_and_registry_are_the_same_set() -> None:
    prefixes = tuple(f"{collective}_" for collective in ALGORITHMS)
    files = {
        module.name for module in pkgutil.iter_modules(mpitrain.schedules.__path__) if module.name.startswith(prefixes)
    }
    assert files == set(NAMES)


@by_name
def test_generator_has_name_of_its_file(algorithm: Algorithm) -> None:
    module = importlib.import_module(f"mpitrain.schedules.{algorithm.qualified_name}")
    assert algorithm.schedule is getattr(module, algorithm.qualified_name)
    assert ALGORITHMS[algorithm.collective][algorithm.name] is algorithm


@by_name
def test_arguments_are_those_announced(algorithm: Algorithm) -> None:
    expected = ["rank", "size"]
    expected += ["root"] * algorithm.takes_root + ["num_segments"] * algorithm.takes_segments
    assert list(inspect.signature(algorithm.schedule).parameters) == expected


@by_name
def test_docstring_states_requirements_cost_and_source(algorithm: Algorithm) -> None:
    text = inspect.getdoc(algorithm.schedule) or ""
    for part in ("Requires: ", "Cost: ", "Source: "):
        assert part in text
    doi = algorithm.source.split("doi:")[1]
    assert doi in text
    assert ("commutative" in text) == ("commutative" in algorithm.restrictions)


@pytest.mark.parametrize(
    ("collective", "name", "size", "num_segments", "num_chunks"),
    [
        ("allreduce", "ring", 6, 5, 6),
        ("allreduce", "recursive_doubling", 6, 5, 1),
        ("allreduce", "halving_doubling", 6, 5, 4),
        ("allreduce", "halving_doubling", 8, 5, 8),
        ("allreduce", "double_tree", 6, 5, 10),
        ("broadcast", "binomial", 6, 5, 1),
        ("broadcast", "scatter_allgather", 6, 5, 6),
        ("broadcast", "chain", 6, 5, 5),
        ("reduce", "binomial", 6, 5, 1),
        ("alltoall", "pairwise", 6, 5, 12),
        ("barrier", "dissemination", 6, 5, 0),
    ],
)
def test_chunk_space_is_the_documented_one(
    collective: str, name: str, size: int, num_segments: int, num_chunks: int
) -> None:
    assert find_algorithm(collective, name).num_chunks(size, num_segments) == num_chunks


@pytest.mark.parametrize("collective", ["reduce_scatter", "allgather", "gather", "scatter"])
def test_chunk_space_has_one_chunk_per_rank(collective: str) -> None:
    for algorithm in ALGORITHMS[collective].values():
        assert [algorithm.num_chunks(size, 3) for size in (1, 2, 7, 8)] == [1, 2, 7, 8]


@pytest.mark.parametrize(
    ("name", "size", "num_segments", "rounds", "volume"),
    [
        # By hand from the published costs.
        ("allreduce ring", 5, 1, 8, Fraction(8, 5)),
        ("allreduce recursive_doubling", 8, 1, 3, Fraction(3)),
        ("allreduce recursive_doubling", 7, 1, 4, Fraction(3)),
        ("allreduce halving_doubling", 8, 1, 6, Fraction(7, 4)),
        ("allreduce double_tree", 16, 10, 17, Fraction(2)),
        ("reduce_scatter recursive_halving", 8, 1, 3, Fraction(7, 8)),
        ("allgather bruck", 6, 1, 3, Fraction(5, 6)),
        ("allgather recursive_doubling", 3, 1, 3, Fraction(5, 3)),
        ("broadcast binomial", 9, 1, 4, Fraction(4)),
        ("broadcast chain", 4, 6, 8, Fraction(1)),
        ("gather binomial", 5, 1, 3, Fraction(2, 5)),
        ("barrier dissemination", 9, 1, 4, Fraction(0)),
    ],
)
def test_cost_of_a_case_is_the_published_one(
    name: str, size: int, num_segments: int, rounds: int, volume: Fraction
) -> None:
    algorithm = find_algorithm(*name.split())
    assert algorithm.rounds(size, num_segments) == rounds
    assert algorithm.volume(size, num_segments) == volume


def loads_by_distance(current: Round, rank: int, size: int) -> tuple[Counter[object], bool]:
    loads: Counter[object] = Counter()
    for send in current.sends:
        loads["send", (send.peer - rank) % size] += send.stop - send.start
    for receive in current.receives:
        key = "receive", (receive.peer - rank) % size, receive.reduce
        loads[key] += receive.stop - receive.start
    return loads, bool(current.sends)


@by_name
@pytest.mark.parametrize("size", [2, 3, 6, 8, 13])
def test_is_symmetric_means_that_all_ranks_do_the_same(algorithm: Algorithm, size: int) -> None:
    ranks = [
        [loads_by_distance(current, rank, size) for current in algorithm.rounds_of(rank, size)] for rank in range(size)
    ]
    if algorithm.is_symmetric:
        assert all(loads == ranks[0] for loads in ranks)
    elif size > 3:
        # The flag is not left out where it would speed up the pricing.
        assert any(loads != ranks[0] for loads in ranks)


@by_name
def test_surplus_arguments_are_dropped(algorithm: Algorithm) -> None:
    rounds = list(algorithm.rounds_of(1, 4, root=3, num_segments=2))
    if not algorithm.takes_root:
        assert rounds == list(algorithm.rounds_of(1, 4, root=0, num_segments=2))
    if not algorithm.takes_segments:
        assert rounds == list(algorithm.rounds_of(1, 4, root=3, num_segments=5))
    assert rounds


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 4, "size": 4}, r"rank: out of range, got 4; pass one from 0 to 3"),
        ({"rank": -1, "size": 4}, r"rank: out of range, got -1"),
        ({"rank": 0, "size": 0}, r"size: out of range, got 0; pass one at least 1"),
        ({"rank": 0, "size": 4, "root": 4}, r"root: out of range, got 4"),
        ({"rank": 0, "size": 4, "num_segments": 0}, r"num_segments: out of range, got 0"),
    ],
)
def test_rounds_of_refuses_arguments_before_the_first_round(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_algorithm("broadcast", "chain").rounds_of(**arguments)


def test_find_algorithm_lists_what_is_known() -> None:
    with pytest.raises(ValueError, match="collective: unknown, got 'allsum'; pass one of allreduce, "):
        find_algorithm("allsum", "ring")
    with pytest.raises(ValueError, match="allreduce algorithm: unknown, got 'star'; pass one of ring, "):
        find_algorithm("allreduce", "star")


def test_exports_exist() -> None:
    exported = mpitrain.schedules.__all__
    assert all(hasattr(mpitrain.schedules, name) for name in exported)
    assert {"ALGORITHMS", "prove", "price", "draw_svg", "draw_text", "best_num_segments"} <= set(exported)


def test_files_import_the_standard_library_and_each_other_only() -> None:
    (folder,) = mpitrain.schedules.__path__
    for path in Path(folder).glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0
                names = [node.module or ""]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            else:
                continue
            for name in names:
                is_own = name == "mpitrain.schedules" or name.startswith("mpitrain.schedules.")
                assert is_own or name.split(".")[0] in sys.stdlib_module_names, (path.name, name)
