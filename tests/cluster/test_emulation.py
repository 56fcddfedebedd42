"""The hosts are what the other tests take them for."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cluster.conftest import REPOSITORY, is_running
from tests.cluster.emulated import cluster as emulation
from tests.cluster.emulated.cluster import HEAD, Cluster
from tests.support.limits import HANG_S


def test_hosts_have_names_addresses_and_memory_of_their_own(cluster):
    for host in cluster.hosts:
        look = "hostname; ip -brief address show eth0; ls /dev/shm; touch /dev/shm/$HOSTNAME; ls /dev/shm $TMPDIR"
        name, address, *files = cluster.run(host, ["bash", "-c", look]).stdout.split("\n")
        assert name == host
        assert f" {cluster.address(host)}/24" in address
        # Before anything was written there was nothing, and nobody else writes here.
        assert [line for line in files if line and not line.endswith(":")] == [host]


def test_hosts_reach_each_other_by_name(cluster):
    # A refused connection is an answer.
    for host in (HEAD, *cluster.hosts[1:]):
        answer = cluster.run(host, ["timeout", "5", "bash", "-c", ": </dev/tcp/node0/9"])
        assert "refused" in answer.stderr


def test_the_agent_runs_a_command_on_a_host_as_ssh_does(cluster):
    agent = cluster.mpi_environ()["HYDRA_LAUNCHER_EXEC"]
    words = [agent, "-x", "-o", "BatchMode=yes", "root@node1", "hostname;", "echo", "$SECRET'a b'"]
    done = cluster.run(HEAD, words, {"SECRET": "not passed on"})
    assert done.stdout == "node1\na b\n"
    assert cluster.run(HEAD, [agent, "nowhere", "true"]).returncode == 255


def test_bandwidth_is_limited_in_both_directions(own_cluster):
    own_cluster.set_rate("node1", "200mbit")
    for host, rate in (("node0", "1Gbit"), ("node1", "200Mbit")):
        assert f"rate {rate}" in own_cluster.run(host, ["tc", "qdisc", "show", "dev", "eth0"]).stdout
        assert f"rate {rate}" in own_cluster.run(HEAD, ["tc", "qdisc", "show", "dev", f"to-{host}"]).stdout
    own_cluster.set_rate("node1", None)
    assert "rate" not in own_cluster.run("node1", ["tc", "qdisc", "show", "dev", "eth0"]).stdout


def reaches(cluster: Cluster, host: str) -> bool:
    return "refused" in cluster.run(HEAD, ["timeout", "0.5", "bash", "-c", f": </dev/tcp/{host}/9"]).stderr


def test_hosts_go_down_and_come_back(own_cluster):
    sleeper = own_cluster.popen("node1", ["sleep", "60"])
    own_cluster.unplug("node1")
    assert not reaches(own_cluster, "node1")
    own_cluster.plug("node1")
    while not reaches(own_cluster, "node1"):
        pass
    assert sleeper.poll() is None
    own_cluster.kill("node1")
    assert sleeper.wait(timeout=HANG_S) != 0
    own_cluster.boot("node1")
    assert reaches(own_cluster, "node1")
    own_cluster.poweroff("node1")
    assert not reaches(own_cluster, "node1")
    assert reaches(own_cluster, "node0")


def test_two_clusters_do_not_meet(cluster):
    with Cluster(1) as other:
        assert other.address("node0") == cluster.address("node0")
        other.run("node0", ["touch", "/dev/shm/mine"])
        assert "mine" not in cluster.run("node0", ["ls", "/dev/shm"]).stdout
        # The other one has no such host.
        assert not reaches(other, "node1")


def test_nothing_is_left_behind():
    with Cluster(1) as made:
        sleeper = made.popen("node0", ["sleep", "60"])
        processes = [*made._inits.values(), *(holder.pid for holder in made._holders.values())]
        folder = made._folder
        assert all(map(is_running, processes))
    assert sleeper.wait(timeout=HANG_S) != 0
    assert not any(map(is_running, processes))
    assert not folder.exists()
    made.down()


def test_a_host_that_cannot_start_takes_the_cluster_down(monkeypatch):
    folders = []
    monkeypatch.setattr(emulation.Cluster, "set_rate", lambda self, *_: folders.append(self._folder) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        Cluster(1)
    assert not folders[0].exists()


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_cluster_ends_with_the_process_that_made_it(tmp_path, number):
    script = Path(emulation.__file__)
    maker = subprocess.Popen(
        [sys.executable, str(script), "1", "--", "bash", "-c", 'echo up; dirname "$TMPDIR"; sleep 60'],
        stdout=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
    )
    assert maker.stdout.readline() == "up\n"
    folder = Path(maker.stdout.readline().rstrip())
    assert folder.is_dir()
    children = Path(f"/proc/{maker.pid}/task/{maker.pid}/children").read_text().split()
    maker.send_signal(number)
    maker.wait(timeout=HANG_S)
    maker.stdout.close()
    while any(is_running(int(child)) for child in children) or folder.exists():
        time.sleep(0.01)
