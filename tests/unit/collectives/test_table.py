from __future__ import annotations

import copy
import dataclasses
import datetime as dt
import json
import logging
import pickle
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpitrain.collectives.choice import AlgorithmChoice
from mpitrain.collectives.selection import Available
from mpitrain.collectives.table import FORMAT_VERSION, Key, Shape, Table
from mpitrain.collectives.table_file import Machine, load_table, read_table, store_table, table_path
from mpitrain.comm import Topology, run_ranks
from mpitrain.config import Settings, cache_folder
from mpitrain.schedules import ALGORITHMS

PAIR = Shape(1, 2, 2, 2)
UNEVEN = Shape(2, 1, 3, 4)
MACHINE = Machine("Some CPU", 2, "in-process ranks", "1")
TODAY = dt.date(2026, 1, 31)


def make_table(fingerprint: str = MACHINE.fingerprint) -> Table:
    choices = {
        Key("allreduce", PAIR, True): ((1000, "native"), (5000, "direct"), (None, "ring")),
        Key("allreduce", PAIR, False): ((1000, "double_tree"),),
        Key("allreduce", PAIR, True, in_window=True): ((None, "direct"),),
        Key("broadcast", UNEVEN, True): ((None, "chain"),),
        Key("allreduce", UNEVEN, True): ((None, "hierarchical"),),
    }
    return Table(fingerprint, {"mpitrain": "0.1.0"}, TODAY, choices)


@pytest.fixture
def here(monkeypatch) -> Machine:
    monkeypatch.setattr(Machine, "here", classmethod(lambda cls, transport: MACHINE))
    return MACHINE


@pytest.mark.parametrize(
    ("nbytes", "expected"),
    [(0, "native"), (1000, "native"), (1001, "direct"), (5000, "direct"), (5001, "ring"), (1 << 40, "ring")],
)
def test_step_holds_up_to_its_size(nbytes, expected):
    assert make_table().lookup("allreduce", nbytes, PAIR, blocking=True) == expected


def test_each_use_and_shape_has_steps_of_its_own():
    table = make_table()
    assert table.lookup("allreduce", 10, PAIR, blocking=False) == "double_tree"
    assert table.lookup("allreduce", 10, PAIR, blocking=True, in_window=True) == "direct"
    assert table.lookup("allreduce", 10, UNEVEN, blocking=True) == "hierarchical"
    assert table.lookup("broadcast", 10, UNEVEN, blocking=True) == "chain"


def test_nothing_is_said_of_what_was_not_measured():
    table = make_table()
    assert table.lookup("allreduce", 1001, PAIR, blocking=False) is None
    assert table.lookup("broadcast", 10, PAIR, blocking=True) is None
    assert table.lookup("allreduce", 10, Shape(1, 3, 3, 3), blocking=True) is None
    assert table.lookup("allreduce", 10, PAIR, blocking=False, in_window=True) is None


def test_shape_is_that_of_the_nodes():
    topology = Topology(rank=0, nodes=((0, 2, 3), (1,)), node_index=0, cores_per_rank=1.0)
    assert Shape.of(topology) == UNEVEN
    assert (str(UNEVEN), str(PAIR)) == ("2 x 1-3, 4 ranks", "1 x 2")


@pytest.mark.parametrize("shape", [(0, 1, 1, 1), (1, 2, 3, 3), (2, 1, 3, 7), (2, 0, 2, 2), (2, 3, 2, 5), (3, 2, 4, 7)])
def test_shape_that_no_group_has_is_refused(shape):
    with pytest.raises(ValueError, match="shape: no group can have it"):
        Shape(*shape)


@given(counts=st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_shape_of_any_nodes_is_accepted(counts):
    assert Shape(len(counts), min(counts), max(counts), sum(counts)).size == sum(counts)


def test_table_survives_json_and_pickle():
    table = make_table()
    assert Table.from_json(json.loads(json.dumps(table.to_json()))) == table
    assert pickle.loads(pickle.dumps(table)) == table


def replaced(path: tuple[str | int, ...], value: object) -> object:
    data = make_table().to_json()
    place = data
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = value
    return data


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("format",), FORMAT_VERSION + 1, "format: another one is needed, got 2"),
        (("format",), True, "format of table: must be int"),
        (("format",), "1", "format of table: must be int"),
        (("date",), "yesterday", "Invalid isoformat string"),
        (("versions", "Python"), 3, "version of Python: must be str"),
        (("extra",), 1, "table: must have the fields"),
        (("choices",), {}, "choices of table: must be list"),
        (("choices", 0), [], "choice: must be dict"),
        (("choices", 0, "blocking"), 1, "blocking of choice: must be bool"),
        (("choices", 0, "collective"), "allsum", "collective: unknown, got 'allsum'"),
        (("choices", 0, "shape", "size"), 99, "shape: no group can have it"),
        (("choices", 0, "shape", "size"), 2.0, "size of shape: must be int"),
        (("choices", 0, "steps"), [], "steps of allreduce: need at least one"),
        (("choices", 0, "steps"), [[10, "bogus"]], "algorithm of allreduce: unknown, got 'bogus'"),
        (("choices", 0, "steps"), [[10, "auto"]], "algorithm of allreduce: unknown, got 'auto'"),
        (("choices", 0, "steps"), [[10, "binomial"]], "algorithm of allreduce: unknown, got 'binomial'"),
        (("choices", 0, "steps"), [[10, "ring"], [10, "native"]], "sizes must ascend, got 10 after 10"),
        (("choices", 0, "steps"), [[-5, "ring"]], "sizes must ascend, got -5"),
        (("choices", 0, "steps"), [[None, "ring"], [10, "native"]], "sizes must ascend, got None"),
        (("choices", 0, "steps"), [[10.5, "ring"]], "size of a step: must be int"),
        (("choices", 0, "steps"), [[True, "ring"]], "size of a step: must be int"),
        (("choices", 0, "steps"), [[10, 7]], "algorithm of a step: must be str"),
        (("choices", 0, "steps"), [[10]], "step: must be a size and an algorithm"),
        (("choices", 0, "steps"), ["ring"], "step: must be list"),
    ],
)
def test_whatever_is_wrong_is_refused(path, value, message):
    with pytest.raises(ValueError, match=message):
        Table.from_json(replaced(path, value))


@pytest.mark.parametrize("data", [None, 1, "text", [], {}])
def test_json_of_something_else_is_refused(data):
    with pytest.raises(ValueError, match=r"^table: must"):
        Table.from_json(data)


def test_two_choices_for_the_same_are_refused():
    data = make_table().to_json()
    data["choices"].append(copy.deepcopy(data["choices"][0]))
    with pytest.raises(ValueError, match="choices: two for the same"):
        Table.from_json(data)


def test_hierarchical_is_an_all_reduce_only():
    with pytest.raises(ValueError, match="algorithm of broadcast: unknown, got 'hierarchical'"):
        Table("", {}, TODAY, {Key("broadcast", PAIR, True): ((None, "hierarchical"),)})


def test_update_keeps_what_is_not_replaced():
    key = Key("allreduce", PAIR, True)
    newer = Table(MACHINE.fingerprint, {"mpitrain": "0.2.0"}, TODAY, {key: ((None, "ring"),)})
    merged = make_table().updated(newer)
    assert merged.choices == {**make_table().choices, key: ((None, "ring"),)}
    assert merged.versions == {"mpitrain": "0.2.0"}


def test_fingerprint_depends_on_everything():
    others = [
        dataclasses.replace(MACHINE, **{field.name: "other" if field.type == "str" else 99})
        for field in dataclasses.fields(MACHINE)
    ]
    assert len({each.fingerprint for each in [MACHINE, *others]}) == len(others) + 1
    assert len({each.family for each in [MACHINE, *others]}) == len(others)


def test_machine_of_a_process_is_known():
    (machine,) = run_ranks(1, Machine.here)
    assert machine.cpu
    assert machine.num_cores >= 1
    assert machine.mpi == "in-process ranks"


def test_folder_is_the_setting_or_in_the_cache(tmp_path):
    assert table_path(MACHINE, Settings(tune_dir=str(tmp_path))) == tmp_path / f"{MACHINE.fingerprint}.json"
    assert table_path(MACHINE, Settings()).parent == cache_folder() / "tune"
    assert cache_folder({"XDG_CACHE_HOME": "/some/where"}) == Path("/some/where/mpitrain")
    for ignored in ({"XDG_CACHE_HOME": "relative"}, {"XDG_CACHE_HOME": ""}, {}):
        assert cache_folder(ignored) == Path.home() / ".cache" / "mpitrain"


def test_stored_table_is_read_again_and_may_be_read_by_all(tmp_path):
    path = tmp_path / "a" / "b" / "table.json"
    store_table(make_table(), path)
    store_table(make_table(), path)
    assert read_table(path, MACHINE) == make_table()
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert list(path.parent.iterdir()) == [path]


def test_failed_store_leaves_the_old_table_and_no_pieces(tmp_path, monkeypatch):
    path = tmp_path / "table.json"
    store_table(make_table(), path)

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        store_table(make_table("other"), path)
    assert read_table(path, MACHINE) == make_table()
    assert list(tmp_path.iterdir()) == [path]


def test_every_rank_gets_the_table_of_rank_0(tmp_path, here):
    settings = Settings(tune_dir=str(tmp_path / "tables"))
    elsewhere = Settings(tune_dir=str(tmp_path / "empty"))
    store_table(make_table(), table_path(here, settings))
    for has_it in (True, False):
        first, others = (settings, elsewhere) if has_it else (elsewhere, settings)
        tables = run_ranks(3, lambda each, a=first, b=others: load_table(each, a if each.rank == 0 else b))
        assert tables == [make_table() if has_it else None] * 3


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[1]", b"\xff\xfe\x00", b"[" * 100_000, json.dumps(make_table("of-another").to_json()).encode()],
    ids=["empty", "torn", "no table", "no text", "deep", "of another machine"],
)
def test_unusable_file_is_left_out_with_one_warning(tmp_path, here, caplog, content):
    settings = Settings(tune_dir=str(tmp_path))
    path = table_path(here, settings)
    path.write_bytes(content)
    with caplog.at_level(logging.WARNING, "mpitrain"):
        assert run_ranks(2, lambda each: load_table(each, settings)) == [None, None]
    (record,) = caplog.records
    assert str(path) in record.getMessage()
    assert "mpitrain tune" in record.getMessage()


def test_folder_in_place_of_the_file_is_left_out_with_one_warning(tmp_path, here, caplog):
    settings = Settings(tune_dir=str(tmp_path))
    table_path(here, settings).mkdir()
    assert run_ranks(2, lambda each: load_table(each, settings)) == [None, None]
    assert len(caplog.records) == 1


def test_table_of_another_mpi_version_is_stale(tmp_path, here, caplog):
    settings = Settings(tune_dir=str(tmp_path))
    older = dataclasses.replace(here, mpi_version="0")
    path = table_path(older, settings)
    store_table(make_table(older.fingerprint), path)
    assert run_ranks(2, lambda each: load_table(each, settings)) == [None, None]
    (record,) = caplog.records
    assert str(path) in record.getMessage()
    assert "not measured with in-process ranks 1" in record.getMessage()


def test_tables_of_other_machines_are_passed_over_in_silence(tmp_path, here, caplog):
    settings = Settings(tune_dir=str(tmp_path))
    other = dataclasses.replace(here, cpu="Another CPU")
    store_table(make_table(other.fingerprint), table_path(other, settings))
    assert run_ranks(2, lambda each: load_table(each, settings)) == [None, None]
    assert not caplog.records


class TestChoice:
    def test_name_is_taken_whatever_was_measured(self):
        choice = AlgorithmChoice(Available(shared="direct"), PAIR, make_table(), 1 << 19)
        assert choice.choose("allreduce", "halving_doubling", 10) == "halving_doubling"

    def test_table_decides_where_it_can(self):
        choice = AlgorithmChoice(Available(shared="direct"), PAIR, make_table(), 1 << 19)
        assert choice.choose("allreduce", "auto", 3000) == "direct"
        assert choice.choose("allreduce", "auto", 10, blocking=False) == "double_tree"

    def test_prediction_decides_where_the_table_is_silent(self):
        with_table = AlgorithmChoice(Available(shared="direct"), PAIR, make_table(), 1 << 19)
        without = AlgorithmChoice(Available(shared="direct"), PAIR, None, 1 << 19)
        for nbytes in (2000, 1 << 27):
            assert with_table.choose("allreduce", "auto", nbytes, blocking=False) == without.choose(
                "allreduce", "auto", nbytes, blocking=False
            )

    def test_measured_algorithm_that_is_not_there_is_passed_over(self):
        choice = AlgorithmChoice(Available(has_native=False), PAIR, make_table(), 1 << 19)
        for nbytes in (10, 3000):
            assert choice.choose("allreduce", "auto", nbytes) in ALGORITHMS["allreduce"]

    def test_unknown_name_is_refused(self):
        choice = AlgorithmChoice(Available(has_native=False), PAIR, make_table(), 1 << 19)
        with pytest.raises(ValueError, match="algorithm of allreduce: unknown, got 'native'"):
            choice.choose("allreduce", "native", 10)
