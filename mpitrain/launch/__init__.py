"""Starts the ranks of a job: reads host lists, builds the command of the MPI at hand, watches over what it starts.

No shell takes part, and no MPI is initialised in this process.
"""

from mpitrain.launch.command import BINDINGS, JobRequest, build_command, names_to_forward
from mpitrain.launch.hosts import Host, parse_hosts, place_ranks, read_hostfile
from mpitrain.launch.launchers import KINDS, Launcher, check_user, find_launcher, is_rank
from mpitrain.launch.reach import check_names, is_known
from mpitrain.launch.supervisor import run_job

__all__ = [
    "BINDINGS",
    "KINDS",
    "Host",
    "JobRequest",
    "Launcher",
    "build_command",
    "check_names",
    "check_user",
    "find_launcher",
    "is_known",
    "is_rank",
    "names_to_forward",
    "parse_hosts",
    "place_ranks",
    "read_hostfile",
    "run_job",
]
