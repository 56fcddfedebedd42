"""A rank that ends early ends the waiting of the others: real jobs, started here."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.support.limits import HANG_S

pytest.importorskip("torch")

MPIRUN = Path(sys.executable).parent / "mpirun"
pytestmark = [
    pytest.mark.skipif(not MPIRUN.exists(), reason="no mpirun beside the interpreter: install an MPI wheel"),
]

PROLOGUE = """
import sys, time
import torch
import mpitrain.torch as hvd

from tests.support.limits import HANG_S
hvd.init()
rank = hvd.rank()
hvd.allreduce(torch.ones(1))
"""

WAITING = {
    "named": """
hvd.allreduce(torch.ones(2), name="lost")
""",
    "gradients": """
weight = torch.nn.Parameter(torch.ones(3))
optimizer = hvd.DistributedOptimizer(torch.optim.SGD([weight], lr=0.1))
for step in range(2):
    hvd.barrier()
    if rank == leaver and step == 1:
        leave()
    weight.sum().backward()
    optimizer.step()
""",
    "process set": """
pair = hvd.add_process_set([1, leaver])
if rank == leaver:
    leave()
hvd.allreduce(torch.ones(2), process_set=pair if rank == 1 else hvd.global_process_set)
""",
    "first step": """
if rank == leaver:
    leave()
hvd.DistributedOptimizer(torch.optim.SGD([torch.nn.Parameter(torch.ones(3))], lr=0.1)).step()
""",
}


def run(size: int, body: str) -> tuple[int, str]:
    program = PROLOGUE + textwrap.dedent(body)
    done = subprocess.run(
        [MPIRUN, "-np", str(size), sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=HANG_S,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("waiting", "leaver", "size"),
    [("named", 0, 3), ("named", 2, 3), ("gradients", 1, 2), ("process set", 0, 3), ("first step", 1, 2)],
)
def test_an_exception_on_one_rank_ends_the_job_with_its_name_and_reason(waiting: str, leaver: int, size: int) -> None:
    body = f"""
leaver = {leaver}
def leave():
    raise KeyError("batch 17")
if rank == leaver and {waiting!r} == "named":
    leave()
"""
    code, output = run(size, body + WAITING[waiting])
    assert code != 0, output
    assert f"rank {leaver} has failed with KeyError: 'batch 17'" in output, output


@pytest.mark.parametrize("leaver", [0, 1])
def test_a_rank_that_exits_early_ends_the_waiting_of_the_others(leaver: int) -> None:
    body = f"""
if rank == {leaver}:
    sys.exit(0)
try:
    hvd.allreduce(torch.ones(2), name="lost")
except hvd.HorovodInternalError as error:
    print("CAUGHT", error)
    sys.exit(3)
"""
    code, output = run(2, body)
    assert code != 0, output
    assert f"CAUGHT allreduce.lost: cannot complete: rank {leaver} has finished" in output, output


def test_an_elastic_job_ends_with_the_process_that_has_failed() -> None:
    body = """
state = hvd.elastic.TorchState(step=0)

@hvd.elastic.run
def train(state):
    while True:
        hvd.allreduce(torch.ones(1), name="step")
        state.step += 1
        if state.step == 3 and hvd.rank() == 1:
            raise KeyError("batch 17")

try:
    train(state)
except hvd.HorovodInternalError as error:
    print("CAUGHT", error)
    raise
"""
    code, output = run(2, body)
    assert code != 0, output
    assert "CAUGHT" in output, output
    assert "elastic run: KeyError: 'batch 17'" in output, output


def test_a_job_may_end_without_shutdown_and_with_operations_in_flight_and_one_rank_late() -> None:
    body = """
hvd.allreduce_async(torch.ones(2), name="never waited for")
if rank == 1:
    time.sleep(0.5)
print("END")
"""
    code, output = run(2, body)
    assert code == 0, output
    assert output.count("END") == 2
    assert "Traceback" not in output


def test_one_process_without_a_launcher() -> None:
    program = PROLOGUE + "assert hvd.size() == 1\nprint(hvd.allreduce(torch.tensor(2.5)).item())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=HANG_S, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "2.5"
