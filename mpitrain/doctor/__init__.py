"""Finds out whether training can run here, and says what to do where it cannot."""

from mpitrain.doctor.findings import Finding, Status, can_train
from mpitrain.doctor.host import check_cross_memory, check_host
from mpitrain.doctor.launching import check_launcher, check_reach
from mpitrain.doctor.mpi import check_mpi, why_mpi_does_not_start
from mpitrain.doctor.packages import check_packages
from mpitrain.doctor.ranks import check_agreement, facts_of_rank

__all__ = [
    "Finding",
    "Status",
    "can_train",
    "check_agreement",
    "check_cross_memory",
    "check_host",
    "check_launcher",
    "check_mpi",
    "check_packages",
    "check_reach",
    "facts_of_rank",
    "why_mpi_does_not_start",
]
