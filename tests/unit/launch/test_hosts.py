from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpitrain.errors import LaunchError
from mpitrain.launch.hosts import Host, parse_hosts, place_ranks, read_hostfile

SAMPLES = sorted((Path(__file__).parents[3] / "hostfiles").glob("*.txt"))


def test_a_list_of_hosts():
    assert parse_hosts("node0:4, node1,10.0.0.7:2") == [Host("node0", 4), Host("node1", 1), Host("10.0.0.7", 2)]


def test_slots_of_a_host_that_is_listed_again_add_up():
    assert parse_hosts("a:2,b,a:3") == [Host("a", 5), Host("b", 1)]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a,,b",
        ":4",
        "a:0",
        "a:-1",
        "a:x",
        "a:1:2",
        "a:99999999999999999999",
        "a:٣",
        "-oProxyCommand=touch evil",
        "a;touch evil",
        "$(touch evil)",
        "`touch evil`",
        "a b",
        "a\nb",
        "user@a",
        "a|b",
        "a&b",
        "../a",
        "a\0",
        "ä",
        ".a",
        "a.",
        "a-",
        "x" * 254,
    ],
)
def test_a_host_that_cannot_be_one_is_refused(text):
    with pytest.raises(LaunchError, match="hosts "):
        parse_hosts(text)


@given(st.text(max_size=30))
def test_whatever_is_accepted_means_nothing_to_a_shell_or_to_ssh(text):
    try:
        hosts = parse_hosts(text)
    except LaunchError:
        return
    for host in hosts:
        assert re.fullmatch(r"[A-Za-z0-9_.-]+", host.name)
        assert not host.name.startswith("-")
        assert host.slots >= 1


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("node0 slots=4\nnode1 slots=2 max_slots=8\n", [Host("node0", 4), Host("node1", 2)]),
        ("node0 slots = 4 # comment\n\n# all\nnode1 max-slots=3\n", [Host("node0", 4), Host("node1", 1)]),
        ("node0:4\nnode1:2\n", [Host("node0", 4), Host("node1", 2)]),
        ("node0\nnode0\nnode1\nnode0\n", [Host("node0", 3), Host("node1", 1)]),
        ("\tnode0:2\r\nnode1 SLOTS=2\r\n", [Host("node0", 2), Host("node1", 2)]),
    ],
    ids=["Open MPI", "Open MPI with blanks", "MPICH", "plain", "carriage returns"],
)
def test_a_hostfile_of_each_kind(tmp_path, content, expected):
    path = tmp_path / "hosts"
    path.write_bytes(content.encode())
    assert read_hostfile(path) == expected


@pytest.mark.parametrize(
    ("content", "line", "problem"),
    [
        ("node0 slots=4\nnode1 slots=many\n", 2, "slots must be a number from 1, got 'many'"),
        ("# one\n\nnode0;reboot\n", 3, "is no host name or IPv4 address, got 'node0;reboot'"),
        ("node0:2\nnode1 cores=4\n", 2, "unknown entry, got 'cores=4'"),
        ("node0 4\n", 1, "unknown entry, got '4'"),
        ("node0:2 slots=2\n", 1, "has the slots twice"),
        ("node0 max_slots=0\n", 1, "slots must be a number from 1, got '0'"),
        ("+n0\n", 1, "is no host name"),
    ],
)
def test_a_bad_entry_is_named_by_file_and_line(tmp_path, content, line, problem):
    path = tmp_path / "hosts"
    path.write_text(content)
    with pytest.raises(LaunchError) as caught:
        read_hostfile(path)
    assert str(caught.value).startswith(f"hostfile {path}, line {line}: ")
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_hostfile_that_cannot_be_read(tmp_path):
    with pytest.raises(LaunchError, match="cannot be read, No such file"):
        read_hostfile(tmp_path / "none")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\0")
    with pytest.raises(LaunchError, match="cannot be read, is not text"):
        read_hostfile(tmp_path / "binary")
    (tmp_path / "empty").write_text("# nothing\n")
    with pytest.raises(LaunchError, match="names no host, got 1 lines"):
        read_hostfile(tmp_path / "empty")


@pytest.mark.parametrize("path", SAMPLES, ids=lambda path: path.name)
def test_the_samples_list_what_their_names_say(path):
    nodes, slots = map(int, re.search(r"-(\d+)x(\d+)\.txt$", path.name).groups())
    assert [host.slots for host in read_hostfile(path)] == [slots] * nodes
    assert path.read_text().startswith("# ")


def test_there_are_samples_for_every_vendor():
    assert {path.name.split("-")[0] for path in SAMPLES} >= {"openmpi", "mpich", "intelmpi", "plain"}


def test_ranks_fill_hosts_in_order():
    hosts = [Host("a", 3), Host("b", 2), Host("c", 4)]
    assert place_ranks(hosts, None) == hosts
    assert place_ranks(hosts, 4) == [Host("a", 3), Host("b", 1)]
    assert place_ranks(hosts, 3) == [Host("a", 3)]
    assert place_ranks(hosts, 9) == hosts
    with pytest.raises(LaunchError, match=r"more than there are slots, got 10 for 9 \(a:3,b:2,c:4\)"):
        place_ranks(hosts, 10)
