"""Jobs on several hosts: where ranks are, that sums are right, and that a lost host ends the job."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cluster.conftest import VARIABLES, answer_of, run_on_head
from tests.cluster.emulated.cluster import HEAD
from tests.support.limits import HANG_S

JOBS = Path(__file__).parent / "jobs.py"


def expected_whereabouts(slots: list[int]) -> list[dict[str, object]]:
    """What ranks find that fill hosts in order."""
    expected = []
    for index, count in enumerate(slots):
        for local_rank in range(count):
            across = [other for other, num_ranks in enumerate(slots) if num_ranks > local_rank]
            expected.append(
                {
                    "host": f"node{index}",
                    "local": [local_rank, count],
                    "cross": [across.index(index), len(across)],
                    "homogeneous": len({num for num in slots if num}) == 1,
                }
            )
    return expected


def without(ranks: list[dict[str, object]], name: str) -> list[dict[str, object]]:
    return [{key: value for key, value in rank.items() if key != name} for rank in ranks]


@pytest.mark.parametrize("slots", [[2, 2, 0], [1, 3, 1]], ids=["even", "uneven"])
def test_mpirun_with_a_hostfile_and_every_algorithm(cluster, mpi, slots):
    found = answer_of(run_on_head(cluster, mpi.mpirun(cluster, slots, JOBS, "sums")))
    begins = [sum(slots[:index]) for index in range(len(slots))]
    nodes = [list(range(begin, begin + count)) for begin, count in zip(begins, slots, strict=True) if count]
    assert found["nodes"] == nodes
    assert set(found["wrong"].values()) == {0}
    assert {"hierarchical, float32", "hierarchical, shared", "ring, int64", "native, int64"} <= set(found["wrong"])


def mpitrain_run(*arguments: object) -> list[object]:
    return [sys.executable, "-m", "mpitrain", "run", *arguments, sys.executable, JOBS]


@pytest.mark.parametrize(
    ("content", "slots"),
    [
        ("node0 slots=2\nnode1 slots=1\nnode2 slots=1\n", [2, 1, 1]),
        ("node0:1\nnode1:2\n", [1, 2, 0]),
        ("node0\nnode1\nnode1\nnode2\n", [1, 2, 1]),
    ],
    ids=["Open MPI", "MPICH", "plain"],
)
def test_mpitrain_run_with_a_hostfile_of_each_kind(cluster, mpi, tmp_path, content, slots):
    hostfile = tmp_path / "hosts"
    hostfile.write_text(content)
    command = mpitrain_run("--hostfile", hostfile, "--algorithm", "ring")
    found = answer_of(run_on_head(cluster, [*command, "whereabouts"]))["ranks"]
    assert {rank["algorithm"] for rank in found} == {"ring"}
    assert without(found, "algorithm") == expected_whereabouts(slots)


def test_mpitrain_run_with_hosts_trains_as_one_process_does(cluster, mpi):
    done = run_on_head(cluster, [*mpitrain_run("-np", 3, "-H", "node0:2,node1:2"), "training"])
    differences = answer_of(done)["differences"]
    assert len(differences) == 3
    assert max(differences) < 1e-6


def test_mpitrain_run_gives_the_status_of_a_rank_that_fails_elsewhere(cluster, mpi):
    done = run_on_head(cluster, [*mpitrain_run("-H", "node0:1,node1:1,node2:1"), "failing"])
    assert done.returncode == 7
    assert "mpitrain: rank 2 on node2 ended first with a failure, status 7" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-H", "node0:1,node7:1"], "mpitrain: hosts: unknown, got node7; correct the names"),
        (["-np", 3, "-H", "node0:1,node1:1"], "mpitrain: ranks: more than there are slots, got 3 for 2"),
    ],
)
def test_mpitrain_run_refuses_hosts_in_one_line(cluster, mpi, arguments, message):
    done = run_on_head(cluster, [*mpitrain_run(*arguments), "whereabouts"])
    assert done.returncode == 2
    assert done.stderr.startswith(message)
    assert done.stderr.count("\n") == 1


def test_the_doctor_sees_which_hosts_are_reached_and_where_ranks_are(cluster, mpi):
    doctor = [sys.executable, "-m", "mpitrain", "doctor", "--json"]
    done = run_on_head(cluster, [*doctor, "-H", "node0:2,node7,node1"])
    found = {finding["name"]: finding for finding in json.loads(done.stdout)["findings"]}
    assert done.returncode == 1
    assert [found[f"host node{index}"]["text"] for index in (0, 7, 1)] == [
        "reached, 2 slots",
        "unknown",
        "reached, 1 slots",
    ]
    done = run_on_head(cluster, mpi.mpirun(cluster, [1, 2, 0], "-m", "mpitrain", "doctor", "--json"))
    found = {finding["name"]: finding for finding in json.loads(done.stdout)["findings"]}
    assert done.returncode == 0, done.stdout
    assert found["ranks"]["text"] == "3 on 2 hosts: node0 1, node1 2"


def test_a_killed_host_ends_the_job_with_an_error(own_cluster, mpi, tmp_path):
    """Only of `mpitrain run`: Open MPI's launcher by itself ends with 0 then as often as not, and at times never."""
    begun = tmp_path / "begun"
    command = [*mpitrain_run("-H", "node0:1,node1:1"), "waiting", begun]
    with own_cluster.popen(HEAD, command, VARIABLES, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as job:
        while not begun.exists():
            assert job.poll() is None, job.stdout.read()
            time.sleep(0.05)
        own_cluster.kill("node1")
        said, _ = job.communicate(timeout=HANG_S)
    assert job.returncode != 0, said
    assert re.search(
        "^mpitrain: (lost ranks .*1: nothing says|rank 0 on node0 ended first with)", said, re.MULTILINE
    ), said
    # The surviving host is left with nothing of the job.
    while "jobs.py" in own_cluster.run("node0", ["ps", "-eo", "args"]).stdout:
        time.sleep(0.1)
