from __future__ import annotations

import builtins
import os
import sys

import pytest

from mpitrain.comm import cuda_aware, mpi_library
from mpitrain.comm.mpi_library import LibraryFacts
from mpitrain.doctor import (
    Finding,
    can_train,
    check_agreement,
    check_cross_memory,
    check_host,
    check_launcher,
    check_mpi,
    check_packages,
    check_reach,
    host,
    launching,
    packages,
    why_mpi_does_not_start,
)
from mpitrain.launch import Host
from mpitrain.memory import can_read, make_sample
from tests.support.fake_cupy import stand_in

MIB = 1 << 20


def find(findings, name):
    return next(finding for finding in findings if finding.name == name)


def test_only_failures_keep_training_from_running():
    assert can_train([Finding("a", "ok", ""), Finding("b", "warning", "")])
    assert not can_train([Finding("a", "ok", ""), Finding("b", "failure", "")])


# Ranks

FACTS = {
    "host": "node0",
    "mpitrain": "0.1.0",
    "MPI library": "Open MPI 5.0.11",
    "Python": "3.11.7",
    "setting algorithm": "auto",
}


def test_ranks_that_are_alike():
    everybodys = [FACTS, FACTS, {**FACTS, "host": "node1"}]
    ranks, balance, agreement = check_agreement(everybodys)
    assert ranks.text == "3 on 2 hosts: node0 2, node1 1"
    assert "different numbers of ranks" in balance.text
    assert agreement.status == "ok"


@pytest.mark.parametrize(
    ("name", "value", "status"),
    [
        ("MPI library", "MPICH 5.0.2", "failure"),
        ("setting algorithm", "ring", "failure"),
        ("Python", "3.10.1", "warning"),
    ],
)
def test_the_odd_rank_is_named(name, value, status):
    everybodys = [FACTS, FACTS, {**FACTS, "host": "node1", name: value}, FACTS]
    odd = find(check_agreement(everybodys), "agreement")
    assert odd.status == status
    assert odd.text == f"{name}: rank 2 on node1 has {value}; most have {FACTS[name]}"


def test_a_rank_whose_settings_cannot_be_used_is_named():
    broken = {key: value for key, value in FACTS.items() if not key.startswith("setting ")}
    everybodys = [FACTS, {**broken, "settings that cannot be used": "MPITRAIN_WAIT: must be"}, FACTS]
    texts = [finding.text for finding in check_agreement(everybodys) if finding.status == "failure"]
    assert any("rank 1 on node0 has MPITRAIN_WAIT: must be; most have nothing" in text for text in texts)


# Host


def test_little_shared_memory_is_a_warning(monkeypatch):
    monkeypatch.setattr(host, "total_shared_nbytes", lambda: 1024 * MIB)
    for free_mib, status in ((512, "ok"), (511, "warning")):
        monkeypatch.setattr(host, "free_shared_nbytes", lambda free=free_mib: free * MIB)
        found = find(check_host(2, 1.0), "shared memory")
        assert (found.status, found.text) == (status, f"{free_mib} of 1024 MiB are free, ranks on this host: 2")
    assert "--shm-size" in found.remedy


@pytest.mark.parametrize(
    ("mine", "local_size", "status", "words"),
    [
        (8, 4, "ok", "8, ranks on this host: 4, this one is not bound"),
        (2, 4, "ok", "8, ranks on this host: 4, this one is bound to 2"),
        (1, 4, "warning", "this one is bound to 1"),
        (1, 8, "ok", "this one is bound to 1"),
        (8, 9, "warning", "more ranks than cores"),
    ],
)
def test_cores_and_binding(monkeypatch, mine, local_size, status, words):
    monkeypatch.setattr(host, "usable_cores", lambda: mine)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    found = find(check_host(local_size, 8 / local_size), "cores")
    assert found.status == status
    assert words in found.text
    assert bool(found.remedy) == (status == "warning")


def test_settings_that_cannot_be_used_are_a_failure(monkeypatch):
    monkeypatch.setenv("MPITRAIN_WAIT", "long")
    found = find(check_host(1, 1.0), "settings")
    assert found.status == "failure"
    assert "MPITRAIN_WAIT: must be auto, spin or sleep, got 'long'" in found.text


# MPI

LIBRARY = LibraryFacts(
    title="Open MPI 5.0.11",
    standard="3.1",
    thread_level="multiple",
    has_ulfm=True,
    can_share=True,
)


def checked(monkeypatch, **changes):
    monkeypatch.setattr(mpi_library, "library_facts", lambda: LibraryFacts(**{**vars_of(LIBRARY), **changes}))
    return check_mpi()


def vars_of(facts):
    return {name: getattr(facts, name) for name in facts.__dataclass_fields__}


def test_a_library_that_has_all(monkeypatch):
    monkeypatch.delenv("OMPI_MCA_mpi_ft_enable", raising=False)
    findings = checked(monkeypatch)
    assert {finding.status for finding in findings} == {"ok"}
    assert find(findings, "MPI library").text == "Open MPI 5.0.11, MPI 3.1"
    assert "mpirun --with-ft ulfm" in find(findings, "ULFM").text


def test_a_library_that_lacks_threads_or_shared_memory(monkeypatch):
    threads = find(checked(monkeypatch, thread_level="funneled"), "thread level")
    assert (threads.status, threads.text) == ("failure", "funneled, where multiple is needed")
    assert find(checked(monkeypatch, can_share=False), "shared windows").status == "warning"
    assert "no: a rank that fails ends the job" in find(checked(monkeypatch, has_ulfm=False), "ULFM").text


@pytest.mark.parametrize(("claim", "words"), [(True, "yes"), (False, "no"), (None, "unknown")])
def test_cuda_awareness_without_a_device_is_what_mpi_says(monkeypatch, claim, words):
    monkeypatch.setattr(cuda_aware, "what_mpi_says", lambda: (claim, "somebody says so"))
    monkeypatch.setitem(sys.modules, "cupy", None)
    found = find(checked(monkeypatch), "CUDA-aware MPI")
    assert found.text == f"{words}: somebody says so; not tried, as there is no device"


@pytest.mark.parametrize(
    ("setting", "words"),
    [("yes", "yes, device arrays go straight to MPI"), ("no", "no, device arrays are staged through pinned memory")],
)
def test_cuda_awareness_with_a_device_is_what_training_finds(monkeypatch, fake_cupy, setting, words):
    monkeypatch.setenv("MPITRAIN_CUDA_AWARE", setting)
    found = find(checked(monkeypatch), "CUDA-aware MPI")
    assert (found.status, found.text) == ("ok", f"{words}: MPITRAIN_CUDA_AWARE={setting}")


def test_an_mpi_that_does_not_start_says_why(monkeypatch):
    assert why_mpi_does_not_start() == ""
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert why_mpi_does_not_start() == "status 1"


# Packages


def test_torch_that_is_missing_or_broken(monkeypatch):
    version = packages.package_version
    monkeypatch.setattr(packages, "package_version", lambda name: "" if name == "torch" else version(name))
    assert find(check_packages(), "torch").status == "warning"
    monkeypatch.setattr(packages, "package_version", lambda name: "2.13")

    def refuse(name, *arguments, original=builtins.__import__, **options):
        if name == "torch":
            raise OSError("libcudart.so: cannot open")
        return original(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", refuse)
    found = find(check_packages(), "torch")
    assert (found.status, found.text) == ("failure", "cannot be imported: libcudart.so: cannot open")


def test_cupy_and_its_devices(monkeypatch):
    monkeypatch.setattr(packages, "package_version", lambda name: "14.0" if name == "cupy-cuda12x" else "")
    with stand_in(num_devices=2) as cupy:
        text = f"{cupy.__version__}, Stand-in, Stand-in"
        assert find(check_packages(), "CuPy") == Finding("CuPy", "ok", text)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        found = find(check_packages(), "CuPy")
    assert found.status == "warning"
    assert "devices: no device can be used, got cudaErrorNoDevice" in found.text


# Launching


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where launchers are looked for, besides the tools of the system."""
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return tmp_path


def write_program(path, body, says="HYDRA build details:\\n    Version: 4.3.2"):
    path.write_text(f'#!/bin/bash\n[[ $1 == --version ]] && echo -e "{says}" && exit\n{body}\n')
    path.chmod(0o755)


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ("echo 'size 2;size 2;'; echo", "ok", "find each other"),
        ("echo 'size 1;'; echo 'size 1;'", "failure", "do not find each other, each is alone"),
        ("echo ---- >&2; echo no slots >&2; exit 3", "failure", "do not run: no slots"),
        ("exit 3", "failure", "do not run: status 3"),
    ],
)
def test_two_ranks_are_tried(folder, body, status, words):
    write_program(folder / "mpirun", body)
    launcher, tried = check_launcher()
    assert launcher == Finding("launcher", "ok", f"MPICH 4.3.2 at {folder / 'mpirun'}")
    assert tried.status == status
    assert words in tried.text


def test_srun_is_not_tried(folder):
    write_program(folder / "srun", "exit 1", says="slurm 23.11.4")
    assert check_launcher()[1].text.startswith("not tried")


def test_no_launcher_and_no_permission(folder, monkeypatch):
    monkeypatch.setenv("PATH", str(folder))
    (missing,) = check_launcher()
    assert missing.status == "failure"
    assert missing.remedy.startswith("load the module of an MPI library")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.delenv("OMPI_ALLOW_RUN_AS_ROOT", raising=False)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    write_program(folder / "mpirun", "exit 1", says="mpirun (Open MPI) 5.0.11")
    (refused,) = check_launcher()
    assert "does not start ranks as root" in refused.text
    assert "OMPI_ALLOW_RUN_AS_ROOT=1" in refused.remedy


def test_hosts_are_reached_by_the_launchers_own_agent(folder, monkeypatch):
    for name in launching._AGENT_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    # Fails for one host; its arguments are those of ssh.
    write_program(
        folder / "agent",
        '[[ $* == "-o BatchMode=yes -o ConnectTimeout=10 localhost true" ]] || { echo denied >&2; exit 255; }',
    )
    monkeypatch.setenv("HYDRA_LAUNCHER_EXEC", str(folder / "agent"))
    hosts = [Host("localhost", 2), Host("127.0.0.1", 1), Host("no-such-host.invalid", 1)]
    reached, denied, unknown = check_reach(hosts)
    assert reached == Finding("host localhost", "ok", "reached, 2 slots")
    assert (denied.status, denied.text) == ("failure", "cannot be reached: denied")
    assert denied.remedy.endswith(f"{folder}/agent 127.0.0.1 true")
    assert (unknown.status, unknown.text) == ("failure", "unknown")
    monkeypatch.setenv("HYDRA_LAUNCHER_EXEC", str(folder / "none"))
    assert check_reach(hosts)[0].text.endswith("none not found, by which they are reached")


def test_memory_of_other_ranks_can_be_read_or_not(monkeypatch):
    sample = make_sample()
    if not can_read([sample]):
        pytest.skip("this system has no cross memory attach")
    assert check_cross_memory([sample, sample]).status == "ok"
    found = check_cross_memory([sample, sample._replace(token=bytes(16))])
    assert found.status == "warning"
    assert "--cap-add=SYS_PTRACE" in found.remedy
    monkeypatch.setenv("MPITRAIN_CROSS_MEMORY", "0")
    assert check_cross_memory([]).text.startswith("off, as MPITRAIN_CROSS_MEMORY")
