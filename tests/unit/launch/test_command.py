from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest

import mpitrain.launch.agent
from mpitrain.errors import LaunchError
from mpitrain.launch.command import JobRequest, build_command, names_to_forward
from mpitrain.launch.hosts import Host
from mpitrain.launch.launchers import Launcher, find_launcher

AGENT = f"{sys.executable} -ISs {mpitrain.launch.agent.__file__} --tag --"
EVEN = (Host("a", 2), Host("b", 2))
UNEVEN = (Host("a", 3), Host("b", 1))
# What each program prints when asked for its version.
SAYS = {
    "openmpi": "mpirun (Open MPI) 5.0.11\n\nReport bugs to https://www.open-mpi.org/community/help/\n",
    "mpich": "HYDRA build details:\n    Version:                                 4.3.2\n    CC: gcc\n",
    "intelmpi": "Intel(R) MPI Library for Linux* OS, Version 2021.13 Build 20240701 (id: 179630a)\n",
    "slurm": "slurm 23.11.4\n",
}
VERSIONS = {"openmpi": "5.0.11", "mpich": "4.3.2", "intelmpi": "2021.13", "slurm": "23.11.4"}


def command(kind: str, **changes) -> str:
    request = JobRequest(**{"program": ("python", "train.py"), "size": 4, **changes})
    return shlex.join(build_command(Launcher(kind, "/usr/bin/start"), request))


@pytest.mark.parametrize(
    ("kind", "changes", "expected"),
    [
        ("openmpi", {"hosts": EVEN}, "-np 4 --host a:2,b:2 --map-by slot --bind-to none"),
        ("openmpi", {"is_local": True}, "-np 4 --host localhost:4 --map-by slot --bind-to none"),
        ("openmpi", {}, "-np 4 --map-by slot --bind-to none"),
        ("openmpi", {"oversubscribe": True}, "-np 4 --map-by slot:OVERSUBSCRIBE --bind-to none"),
        ("openmpi", {"variables": ("A", "B")}, "-np 4 --map-by slot --bind-to none -x A -x B"),
        ("openmpi", {"binding": "numa", "extra": ("--mca", "pml")}, "-np 4 --map-by slot --bind-to numa --mca pml"),
        ("mpich", {"hosts": UNEVEN}, "-np 4 -hosts a:3,b:1"),
        ("mpich", {"is_local": True, "binding": "core", "variables": ("A",)}, "-np 4 -bind-to core"),
        ("intelmpi", {"hosts": EVEN}, "-genvall -genv I_MPI_PIN 0 -ppn 2 -hosts a,b -n 4"),
        ("intelmpi", {"binding": "numa"}, "-genvall -genv I_MPI_PIN_DOMAIN numa -n 4"),
        (
            "slurm",
            {"hosts": EVEN},
            "--ntasks=4 --nodes=2 --ntasks-per-node=2 --nodelist=a,b --export=ALL --kill-on-bad-exit=1 --cpu-bind=none",
        ),
        (
            "slurm",
            {"oversubscribe": True, "binding": "core", "extra": ("--mpi=pmix",)},
            "--ntasks=4 --export=ALL --kill-on-bad-exit=1 --cpu-bind=cores --overcommit --mpi=pmix",
        ),
    ],
)
def test_the_command_of_each_launcher(kind, changes, expected):
    assert command(kind, **changes) == f"/usr/bin/start {expected} {AGENT} python train.py"


def test_intel_mpi_gives_uneven_hosts_arguments_of_their_own():
    expected = f"-host a -n 3 {AGENT} python train.py : -host b -n 1 {AGENT} python train.py"
    assert command("intelmpi", hosts=UNEVEN) == f"/usr/bin/start -genvall -genv I_MPI_PIN 0 {expected}"


def test_slurm_refuses_uneven_hosts():
    with pytest.raises(LaunchError, match="as many ranks on every host, got a:3,b:1"):
        command("slurm", hosts=UNEVEN)


@pytest.mark.parametrize("kind", VERSIONS)
def test_no_argument_of_the_program_becomes_one_of_the_launcher(kind):
    # A lone colon would begin another program.
    program = ("python", ":", "touch", "evil", "\\:", "-H", "b:4", "--")
    words = build_command(Launcher(kind, "start"), JobRequest(program=program, size=2))
    assert ":" not in words
    assert words[-8:] == ["python", "\\:", "touch", "evil", "\\\\:", "-H", "b:4", "--"]
    assert words[-9] == "--"


def test_agents_tag_and_report_as_asked():
    assert f"{mpitrain.launch.agent.__file__} -- python" in command("mpich", tagged=False)
    assert f"{mpitrain.launch.agent.__file__} --tag --token word -- python" in command("mpich", token="word")


def test_settings_and_what_python_needs_are_passed_on():
    environ = {
        "HOME": "/root",
        "HOROVOD_CYCLE_TIME": "1",
        "MPITRAIN_ALGORITHM": "ring",
        "MPITRAIN_x y": "1",
        "PATH": "/bin",
        "SECRET": "no",
        "WANTED": "yes",
    }
    expected = ("HOROVOD_CYCLE_TIME", "MPITRAIN_ALGORITHM", "PATH", "WANTED")
    assert names_to_forward(environ, ["WANTED"]) == expected


@pytest.mark.parametrize("name", ["", "A B", "A;B", "-x", "1A", "É"])
def test_a_variable_with_an_unusable_name_is_refused(name):
    with pytest.raises(LaunchError, match="must have a name of letters"):
        names_to_forward({name: "1"}, [name])


def test_a_variable_that_is_not_set_is_refused():
    with pytest.raises(LaunchError, match="variable WANTED: is not set"):
        names_to_forward({}, ["WANTED"])


def make_program(path: Path, says: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\ncat <<'END'\n{says}END\n")
    path.chmod(0o755)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The only folder of PATH, with no launcher beside Python; the tools that scripts need are linked into it."""
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python" / "python"))
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "cat").symlink_to("/bin/cat")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return tmp_path / "bin"


@pytest.mark.parametrize("kind", VERSIONS)
def test_launchers_are_known_by_what_they_say(folder, kind):
    path = folder / ("srun" if kind == "slurm" else "mpirun")
    make_program(path, SAYS[kind])
    assert find_launcher() == find_launcher(kind) == Launcher(kind, str(path), VERSIONS[kind])


def test_an_mpirun_beside_python_comes_first_and_srun_last(folder, tmp_path):
    make_program(folder / "srun", SAYS["slurm"])
    assert find_launcher().kind == "slurm"
    make_program(folder / "mpiexec", SAYS["intelmpi"])
    assert find_launcher().kind == "intelmpi"
    make_program(folder / "mpirun", SAYS["openmpi"])
    assert find_launcher().kind == "openmpi"
    make_program(tmp_path / "python" / "mpirun", SAYS["mpich"])
    assert find_launcher().kind == "mpich"
    assert find_launcher("openmpi").kind == "openmpi"


def test_a_launcher_that_is_missing_or_of_another_kind(folder):
    with pytest.raises(LaunchError, match=r"mpirun: none found beside .*, got nothing; load the module"):
        find_launcher()
    make_program(folder / "mpirun", "a script of somebody\n")
    with pytest.raises(LaunchError, match="says not what it is"):
        find_launcher()
    make_program(folder / "mpirun", SAYS["mpich"])
    with pytest.raises(LaunchError, match=r"none of Open MPI found .*mpirun \(MPICH 4.3.2\)"):
        find_launcher("openmpi")
