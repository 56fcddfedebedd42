from __future__ import annotations

import re
import xml.etree.ElementTree as ET

import click
import pytest
from click.testing import CliRunner, Result

from mpitrain.bench.fit import Observation
from mpitrain.bench.model import Cluster
from mpitrain.bench.results import to_json
from mpitrain.cli.explain import explain
from mpitrain.cli.simulate import simulate
from mpitrain.collectives.table import Shape
from mpitrain.schedules import ALGORITHMS, find_algorithm
from tests.support.bench_results import make_run, make_setup, make_train_run


def invoke(command: click.Command, *arguments: object) -> Result:
    return CliRunner().invoke(command, [str(argument) for argument in arguments], catch_exceptions=False)


def lines_of(command: click.Command, *arguments: object) -> list[list[str]]:
    done = invoke(command, *arguments)
    assert done.exit_code == 0, done.output
    return [line.split() for line in done.output.splitlines()]


def test_simulation_names_the_fastest_at_each_size():
    lines = lines_of(simulate, "--nodes", 4, "--ranks-per-node", 2, "--sizes", "1K:64M", "--factor", 65536)
    header = next(line for line in lines if line[:1] == ["size"])
    assert header == ["size", "hierarchical", *ALGORITHMS["allreduce"], "fastest"]
    assert [(line[0], line[-1]) for line in lines if line[1:2] in (["KiB"], ["MiB"])] == [
        ("1", "recursive_doubling"),
        ("64", "hierarchical"),
    ]


@pytest.mark.parametrize("collective", ["allreduce", "broadcast", "reduce_scatter", "allgather", "alltoall"])
def test_hundred_thousand_ranks_can_be_simulated(collective):
    lines = lines_of(simulate, collective, "--nodes", 12_500, "--ranks-per-node", 8, "--sizes", "1G")
    assert any("100000" in line for line in lines)


def test_fit_and_check_print_their_errors(tmp_path):
    truth = Cluster(cross_latency_s=3e-4, cross_bytes_per_s=5e7, bytes_per_s=2e9)
    paths = []
    for nodes, sizes in ((2, (1 << 12, 1 << 20)), (4, (1 << 12, 1 << 22)), (3, (1 << 16, 1 << 21))):
        shape = Shape(nodes, 2, 2, 2 * nodes)
        times_s = {
            name: {n: Observation("allreduce", name, n, shape, 1 << 19, 1.0).predicted_s(truth) for n in sizes}
            for name in ("ring", "double_tree", "hierarchical")
        }
        paths.append(tmp_path / f"{nodes}.json")
        paths[-1].write_text(to_json(make_run(times_s, setup=make_setup(nodes, 2))))
    done = invoke(simulate, "--fit", paths[0], "--fit", paths[1], "--check", paths[2], "--sizes", "1M")
    assert done.exit_code == 0, done.output
    fitted, checked = done.output.split("Prediction / measurement - 1, on further measurements")
    rows = [line.split() for line in checked.splitlines() if line.strip().startswith("allreduce")]
    assert [(row[1], row[2:5]) for row in rows] == [
        (name, ["3", "x", "2"]) for name in ("ring", "double_tree", "hierarchical")
    ]
    assert all(abs(float(row[-1].rstrip("%"))) <= 5 for row in rows)
    (link,) = [line.split() for line in fitted.splitlines() if "--cross-bandwidth" in line]
    assert float(link[1]) == pytest.approx(0.05, rel=0.05)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--nodes", "100000", "--ranks-per-node", "2"], "must be at most 100000 ranks, got 200000"),
        (["--nodes", "0"], "'--nodes': 0 is not in the range"),
        (["--sizes", "-1K"], "'--sizes': must be a number of bytes, got '-1K'"),
        (["--latency", "fast"], "'--latency': 'fast' is not a valid float"),
        (["allsum"], "'allsum' is not one of"),
    ],
)
def test_wrong_options_are_refused(arguments, problem):
    done = invoke(simulate, *arguments)
    assert done.exit_code == 2
    assert problem in done.output


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--bandwidth", "-1"], "bytes_per_s: must be positive, got -1000000000"),
        (["--fit", "/nowhere/results.json"], "results: cannot be read, got .*No such file"),
    ],
)
def test_values_without_sense_are_value_errors(arguments, problem):
    # `mpitrain` makes one line of a ValueError.
    with pytest.raises(ValueError, match=problem):
        invoke(simulate, *arguments)


def test_files_without_prices_are_refused(tmp_path):
    for results in (make_train_run(), make_run({"MPI": {8: 1e-6}})):
        path = tmp_path / "results.json"
        path.write_text(to_json(results))
        with pytest.raises(ValueError, match=r"results .*results\.json: no times of float32 sums"):
            invoke(simulate, "--fit", path)


def test_explanation_has_rounds_cost_and_source(tmp_path):
    path = tmp_path / "ring.svg"
    done = invoke(explain, "allreduce", "ring", "--size", 3, "--svg", path)
    assert done.exit_code == 0
    ring = find_algorithm("allreduce", "ring")
    for words in ("->1 [2:3]", "<-2 +[1:2]", "<-2 [2:3]", ring.rounds_formula, "here 4", "here 4/3 n", ring.source):
        assert words in done.output
    assert "fastest" in done.output
    picture = ET.fromstring(path.read_text())
    assert picture.tag.endswith("svg")
    assert len(picture.findall(".//{*}line[@class='reduce']")) >= 2 * 3


@pytest.mark.parametrize("collective", list(ALGORITHMS))
def test_every_algorithm_can_be_explained(collective):
    listing = invoke(explain, collective).output
    for name in ALGORITHMS[collective]:
        assert name in listing
        output = invoke(explain, collective, name, "--size", 40).output
        # So many ranks do not fit side by side, and are shown all the same.
        headings = re.findall(r"rank (\d+)", output)
        assert headings[:40] == [str(rank) for rank in range(40)]


def test_unknown_algorithm_is_a_value_error(tmp_path):
    with pytest.raises(ValueError, match="allreduce algorithm: unknown, got 'fast'; pass one of ring"):
        invoke(explain, "allreduce", "fast")
    with pytest.raises(ValueError, match="root: out of range, got 9"):
        invoke(explain, "broadcast", "chain", "--root", 9)
    with pytest.raises(ValueError, match="picture: cannot be stored"):
        invoke(explain, "allreduce", "ring", "--svg", "/dev/null/ring.svg")
