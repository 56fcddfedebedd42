"""A cluster on one machine: hosts made of Linux namespaces, with a name, an address, a `/dev/shm` and a bandwidth each.

MPI takes the hosts for nodes of their own: ranks of one share memory, ranks of different ones exchange messages over
TCP through a virtual switch. Latency is that of the machine; bandwidth is what is asked for, in both directions.

    python tests/cluster/emulated/cluster.py 4 --rate 1gbit -- mpirun -np 4 --hostfile HOSTFILE python train.py

runs one command on the launch node `head`, from which the hosts `node0`, `node1`, ... are reached, and takes all down
when it has ended. HOSTFILE stands for a file that lists them.

The whole cluster lies in the process and network namespaces of `head`, which ends when the process that made it
does, however that ends. So nothing stays behind, and clusters of several users have nothing in common.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any, final

__all__ = ["HEAD", "Cluster", "why_unavailable"]

HEAD = "head"
_FOLDER = pathlib.Path(__file__).parent
_AGENT = _FOLDER / "rsh-agent"
_TOOLS = ("ip", "tc", "unshare", "nsenter", "bash")
# No address of it leaves the namespace of the head, so all clusters may have the same.
_NETWORK = "10.99.0"
_CARD = "02:63:00:00:00"
_BRIDGE = "br0"
_HEAD_ADDRESS = f"{_NETWORK}.254"
_MOST_HOSTS = 250
_LIMIT_S = 20.0
_PAUSE_S = 0.02
_NAMESPACES = ("--net", "--uts", "--ipc", "--mount", "--pid")


@final
class Cluster:
    """Hosts `node0` to `node<n-1>` and the launch node `head`; a context manager, on leaving all is taken down.

    Args:
        num_hosts: How many hosts besides the head.
        rate: Bandwidth of each host, in both directions, in the words of `tc`, such as "1gbit"; None has no limit.

    Raises:
        OSError: The machine does not let this process make hosts; `why_unavailable` tells beforehand.
    """

    def __init__(self, num_hosts: int, rate: str | None = None) -> None:
        if not 1 <= num_hosts <= _MOST_HOSTS:
            raise ValueError(f"num_hosts: must be from 1 to {_MOST_HOSTS}, got {num_hosts}")
        self.hosts = tuple(f"node{index}" for index in range(num_hosts))
        self._rates = dict.fromkeys(self.hosts, rate)
        self._folder = pathlib.Path(tempfile.mkdtemp(prefix="cluster-"))
        self._holders: dict[str, subprocess.Popen[str]] = {}
        self._inits: dict[str, int] = {}
        self._networks: dict[str, int] = {}
        try:
            self._write_names()
            self._start(HEAD, [])
            self._ip(
                HEAD,
                "link set lo up",
                # With no address of its own it would take that of one port or another, and hosts would lose it.
                f"link add {_BRIDGE} address {_CARD}:fe type bridge forward_delay 0",
                f"addr add {_HEAD_ADDRESS}/24 dev {_BRIDGE}",
                f"link set {_BRIDGE} up",
            )
            for host in self.hosts:
                self.boot(host)
        except BaseException:
            self.down()
            raise

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        self.down()

    def hostfile(self, slots: int | Sequence[int] = 1) -> pathlib.Path:
        """Write a hostfile of Open MPI and return its path.

        Args:
            slots: Ranks of every host, or of each in turn.
        """
        counts = [slots] * len(self.hosts) if isinstance(slots, int) else slots
        path = self._folder / f"hostfile-{'-'.join(map(str, counts))}"
        path.write_text("".join(f"{host} slots={count}\n" for host, count in zip(self.hosts, counts, strict=True)))
        return path

    def address(self, host: str) -> str:
        """Return the address of a host."""
        return _HEAD_ADDRESS if host == HEAD else f"{_NETWORK}.{self.hosts.index(host) + 1}"

    def command(self, host: str, arguments: Sequence[object], environ: dict[str, str] | None = None) -> list[str]:
        """Return the command that runs another one on a host, in the present folder.

        Args:
            host: Where.
            arguments: Program and arguments.
            environ: Variables in addition to those of this process.
        """
        # MPI libraries are told by the environment, as nobody has an option for all of it.
        variables = {**self.mpi_environ(), **(environ or {}), "TMPDIR": str(self._own_folder), "HOSTNAME": host}
        return [
            *self._enter(host),
            "env",
            f"--chdir={pathlib.Path.cwd()}",
            # Set where one host has to take more ranks than it has cores, it would put all ranks on the first one.
            "--unset=PRTE_MCA_rmaps_default_mapping_policy",
            *(f"{name}={value}" for name, value in variables.items()),
            *map(str, arguments),
        ]

    def popen(
        self, host: str, arguments: Sequence[object], environ: dict[str, str] | None = None, **options: Any
    ) -> subprocess.Popen[str]:
        """Start a command on a host; it is killed with the cluster at the latest."""
        return subprocess.Popen(self.command(host, arguments, environ), text=True, **options)

    def run(
        self, host: str, arguments: Sequence[object], environ: dict[str, str] | None = None, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on a host; standard input is empty, and output is caught unless options say otherwise."""
        options = {"stdin": subprocess.DEVNULL, "capture_output": True, **options}
        return subprocess.run(self.command(host, arguments, environ), text=True, check=False, **options)

    def mpi_environ(self) -> dict[str, str]:
        """Return the variables by which Open MPI and MPICH start ranks on the hosts and send over the right network."""
        return {
            "EMULATED_CLUSTER": str(self._folder),
            "OMPI_ALLOW_RUN_AS_ROOT": "1",
            "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
            "PRTE_MCA_plm_ssh_agent": str(_AGENT),
            "PRTE_MCA_prte_if_include": f"{_NETWORK}.0/24",
            # All hosts share the cores of one machine.
            "PRTE_MCA_hwloc_default_binding_policy": "none",
            "OMPI_MCA_mpi_yield_when_idle": "1",
            "OMPI_MCA_pml": "ob1",
            "OMPI_MCA_btl": "tcp,sm,self",
            "OMPI_MCA_btl_tcp_if_include": f"{_NETWORK}.0/24",
            "OMPI_MCA_osc": "^ucx",
            "HYDRA_LAUNCHER": "ssh",
            "HYDRA_LAUNCHER_EXEC": str(_AGENT),
            "MPICH_CH4_NETMOD": "ofi",
            "FI_PROVIDER": "tcp",
            "FI_TCP_IFACE": "eth0",
        }

    def set_rate(self, host: str, rate: str | None) -> None:
        """Change the bandwidth of a host, in both directions."""
        self._rates[host] = rate
        # What comes in is held back where it leaves the switch, so that many senders share the rate, as on a real port.
        for place, device in ((host, "eth0"), (HEAD, self._port(host))):
            self._in_network(place, ["tc", "qdisc", "del", "dev", device, "root"], check=False)
            if rate is not None:
                # The burst exceeds a packet of 64 KiB, which would be cut by software otherwise.
                limits = ["tbf", "rate", rate, "burst", "128k", "latency", "50ms"]
                self._in_network(place, ["tc", "qdisc", "add", "dev", device, "root", *limits])

    def unplug(self, host: str) -> None:
        """Pull the cable of a host; its peers see silence."""
        self._ip(HEAD, f"link set {self._port(host)} down")

    def plug(self, host: str) -> None:
        """Put the cable of a host back."""
        self._ip(HEAD, f"link set {self._port(host)} up")

    def kill(self, host: str) -> None:
        """Kill every process of a host; its network stays, so peers see connections that are closed."""
        holder = self._holders.pop(host)
        # The first process of a process namespace takes all others with it.
        os.kill(self._inits.pop(host), signal.SIGKILL)
        holder.communicate()
        (self._folder / f"{host}.pid").unlink(missing_ok=True)

    def poweroff(self, host: str) -> None:
        """Kill every process of a host behind a pulled cable; its peers see silence."""
        self.unplug(host)
        self.kill(host)

    def boot(self, host: str) -> None:
        """Start a host that is not running, with a network of its own."""
        if host in self._networks:
            self._ip(HEAD, f"link del {self._port(host)}")
            os.close(self._networks.pop(host))
        self._start(host, self._enter(HEAD))
        index = self.hosts.index(host)
        # The address of the card stays the same, so that others find the host after it was started again.
        card = f"address {_CARD}:{index + 1:02x} netns {self._inits[host]}"
        self._ip(HEAD, f"link add {self._port(host)} type veth peer name eth0 {card}")
        self._ip(host, "link set lo up", f"addr add {self.address(host)}/24 dev eth0", "link set eth0 up")
        self._ip(HEAD, f"link set {self._port(host)} master {_BRIDGE} up")
        self.set_rate(host, self._rates[host])
        self._wait_for_network(host)

    def down(self) -> None:
        """Kill everything and remove every host; again it does nothing."""
        for init in self._inits.values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(init, signal.SIGKILL)
        for holder in self._holders.values():
            holder.communicate()
        for descriptor in self._networks.values():
            os.close(descriptor)
        self._inits, self._holders, self._networks = {}, {}, {}
        shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def _own_folder(self) -> pathlib.Path:
        """Where every host has a folder for temporary files of its own."""
        return self._folder / "tmp"

    @staticmethod
    def _port(host: str) -> str:
        """Return the name of the switch's end of a host's cable."""
        return f"to-{host}"

    def _write_names(self) -> None:
        self._own_folder.mkdir()
        lines = ["127.0.0.1 localhost", *(f"{self.address(host)} {host}" for host in (HEAD, *self.hosts))]
        (self._folder / "hosts").write_text("\n".join(lines) + "\n")

    def _start(self, host: str, where: list[str]) -> None:
        """Start the first process of a host; it ends when this process does, and takes the host with it."""
        make = ["unshare", *_NAMESPACES, "--fork", "--kill-child", "--mount-proc", "--propagation", "private"]
        holder = subprocess.Popen(
            [*where, *make, "bash", str(_FOLDER / "init"), host, str(self._folder), str(self._own_folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            # Ctrl-C is for the command that runs on a host, not for the host.
            start_new_session=True,
        )
        self._holders[host] = holder
        assert holder.stdout is not None
        said = holder.stdout.readline()
        if said != "ready\n":
            holder.kill()
            raise OSError(f"cluster: host {host} does not start, it says {said + holder.communicate()[0]!r}")
        # nsenter and unshare stay as parents of the host's first process.
        init = holder.pid
        while _numbers(init)[-1] != 1:
            init = int(pathlib.Path(f"/proc/{init}/task/{init}/children").read_text().split()[0])
        self._inits[host] = init
        # The agent runs on the head, which has numbers of its own for the processes.
        (self._folder / f"{host}.pid").write_text(f"{_numbers(init)[-2]}\n")
        # Keeps the network when all processes of the host are dead, so that it can close their connections.
        self._networks[host] = os.open(f"/proc/{init}/ns/net", os.O_RDONLY | os.O_CLOEXEC)

    def _enter(self, host: str) -> list[str]:
        return ["nsenter", "--target", str(self._inits[host]), *_NAMESPACES, "--"]

    def _in_network(self, host: str, arguments: Sequence[str], *, check: bool = True, text: str | None = None) -> None:
        # Only the network is entered, as processes are named by their numbers out here.
        descriptor = self._networks[host]
        done = subprocess.run(
            ["nsenter", f"--net=/proc/self/fd/{descriptor}", *arguments],
            input=text,
            pass_fds=[descriptor],
            capture_output=True,
            text=True,
            check=False,
        )
        if check and done.returncode:
            raise OSError(f"cluster: {' '.join(arguments)} on {host} {text or ''} failed: {done.stderr.strip()}")

    def _ip(self, host: str, *commands: str) -> None:
        self._in_network(host, ["ip", "-batch", "-"], text="\n".join(commands) + "\n")

    def _wait_for_network(self, host: str) -> None:
        """Wait until packets come through; a refused connection is an answer."""
        end_s = time.monotonic() + _LIMIT_S
        attempt = ["timeout", "0.3", "bash", "-c", f": </dev/tcp/{_HEAD_ADDRESS}/9"]
        while "refused" not in (answer := self.run(host, attempt).stderr):
            if time.monotonic() > end_s:
                raise OSError(f"cluster: host {host} cannot reach the head: {answer.strip()}")
            time.sleep(_PAUSE_S)


def _numbers(process: int) -> list[int]:
    """Return the numbers of a process, from this process's namespace down to its own."""
    for line in pathlib.Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith("NSpid:"):
            return list(map(int, line.split()[1:]))
    raise OSError(f"cluster: the kernel does not tell the numbers of process {process}")


def why_unavailable() -> str:
    """Return why this machine cannot emulate a cluster, in words; "" if it can."""
    if not sys.platform.startswith("linux"):
        return f"an emulated cluster needs Linux, got {sys.platform}"
    if missing := [tool for tool in _TOOLS if shutil.which(tool) is None]:
        return f"an emulated cluster needs the tools {', '.join(_TOOLS)}; {', '.join(missing)} not found"
    if os.geteuid() != 0:
        return "an emulated cluster needs root, to make namespaces and network devices"
    try:
        Cluster(1, "1gbit").down()
    except OSError as error:
        return f"an emulated cluster cannot be made here: {error}"
    return ""


@contextlib.contextmanager
def _ends_by_signals() -> Iterator[None]:
    """Leave by an exception at a signal, so that what is up is taken down."""

    def leave(number: int, _frame: object) -> None:
        sys.exit(128 + number)

    numbers = (signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, leave) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main() -> int:
    """Bring a cluster up, run the command on its head, take it down; the exit status is the command's."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("hosts", type=int, help="number of hosts")
    parser.add_argument("--rate", help="bandwidth of each host, such as 1gbit")
    parser.add_argument("--slots", type=int, default=1, help="ranks per host in the hostfile")
    parser.add_argument("command", nargs="+", help="what to run on the head; HOSTFILE stands for the list of hosts")
    options = parser.parse_args()
    if reason := why_unavailable():
        parser.error(reason)
    with _ends_by_signals(), Cluster(options.hosts, options.rate) as cluster:
        hostfile = str(cluster.hostfile(options.slots))
        arguments = [hostfile if word == "HOSTFILE" else word for word in options.command]
        return cluster.popen(HEAD, arguments).wait()


if __name__ == "__main__":
    sys.exit(main())
