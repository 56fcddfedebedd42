"""The scripts for batch systems, run with stand-ins for these up to the command that they would start."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.limits import HANG_S
from tests.unit.cli.test_run import environment

SCRIPTS = Path(__file__).parents[2] / "scripts"
BATCH = sorted([*SCRIPTS.glob("*.sbatch"), *SCRIPTS.glob("*.pbs")])
PROGRAM = ["train.py", "--name", "a"]


@pytest.fixture
def site(tmp_path):
    """The variables of a job on nodes n1 and n2, and a virtual environment with the tools of the site."""
    bin_folder = tmp_path / "venv" / "bin"
    bin_folder.mkdir(parents=True)
    tools = {
        "python": f'exec {sys.executable} "$@"',
        "srun": "[[ $1 == --version ]] && echo slurm 23.11.4",
        "mpirun": "[[ $1 == --version ]] && echo 'HYDRA build details:' && echo '    Version: 4.3.2'",
        "scontrol": '[[ $* == "show hostnames n[1-2]" ]] && printf "%s\\n" n1 n2',
    }
    for name, body in tools.items():
        (bin_folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (bin_folder / name).chmod(0o755)
    (bin_folder / "activate").write_text(f"PATH={bin_folder}:$PATH\n")
    (tmp_path / "nodes").write_text("n1\nn1\nn2\nn2\n")
    return {
        "VENV": str(tmp_path / "venv"),
        "SLURM_JOB_ID": "7",
        "SLURM_NTASKS": "4",
        "SLURM_NTASKS_PER_NODE": "2",
        "SLURM_CPUS_PER_TASK": "3",
        "SLURM_JOB_NODELIST": "n[1-2]",
        "PBS_O_WORKDIR": str(tmp_path),
        "PBS_NODEFILE": str(tmp_path / "nodes"),
        "PROGRAM": " ".join(PROGRAM),
    }


def dry_run(script: str, variables: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(SCRIPTS / script), *arguments],
        env=environment(DRY_RUN="1", **variables),
        capture_output=True,
        text=True,
        check=False,
        timeout=HANG_S,
    )


@pytest.mark.parametrize(
    ("script", "arguments", "expected"),
    [
        ("slurm_srun.sbatch", PROGRAM, ["--ntasks=4", "--export=ALL"]),
        # An mpirun beside Python may come before the stand-in, so words are asked for that all have.
        ("slurm_mpirun.sbatch", PROGRAM, ["-np", "4", "n1:2,n2:2"]),
        ("pbs_mpirun.pbs", [], ["-np", "4", "n1:2,n2:2"]),
    ],
)
def test_a_script_comes_to_the_right_command(site, script, arguments, expected):
    done = dry_run(script, site, *arguments)
    assert done.returncode == 0, done.stderr
    (command,) = done.stdout.splitlines()
    words = shlex.split(command)
    assert words[-4:] == ["python", *PROGRAM]
    assert set(expected) <= set(words)
    assert Path(words[0]).name == ("srun" if "srun" in script else "mpirun")


@pytest.mark.parametrize(
    ("script", "missing"),
    [
        ("slurm_srun.sbatch", "SLURM_NTASKS"),
        ("slurm_mpirun.sbatch", "SLURM_JOB_NODELIST"),
        ("slurm_mpirun.sbatch", "SLURM_NTASKS_PER_NODE"),
        ("pbs_mpirun.pbs", "PBS_NODEFILE"),
        ("pbs_mpirun.pbs", "PROGRAM"),
    ],
)
def test_a_script_says_what_is_missing_outside_of_a_job(site, script, missing):
    del site[missing]
    done = dry_run(script, site, *PROGRAM)
    assert done.returncode != 0
    assert done.stdout == ""
    assert missing in done.stderr


@pytest.mark.parametrize("path", BATCH, ids=lambda path: path.name)
def test_options_of_the_batch_system_come_before_any_command(path):
    lines = path.read_text().splitlines()
    assert lines[0] == "#!/usr/bin/env bash"
    sign = "#SBATCH" if path.suffix == ".sbatch" else "#PBS"
    options = [index for index, line in enumerate(lines) if line.startswith(sign)]
    first_command = next(index for index, line in enumerate(lines) if line and not line.startswith("#"))
    assert options
    # What follows a command is not read by the batch systems.
    assert max(options) < first_command
    pattern = r"#SBATCH --[a-z-]+=\S+" if sign == "#SBATCH" else r"#PBS -[A-Za-z] \S+"
    assert all(re.fullmatch(pattern, lines[index]) for index in options)
