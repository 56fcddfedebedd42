"""Checkpoints of a job: rank 0 writes and reads the file, and all ranks learn how that went."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mpitrain.collectives import Communicator
from mpitrain.errors import CheckpointError
from mpitrain.training.checkpoint_file import parse_state, read_payload, write_state

__all__ = ["Stateful", "load_checkpoint", "save_checkpoint"]

# What load_state_dict of modules, optimizers, schedules and samplers raises about a state that does not fit.
_MISFITS = (KeyError, ValueError, TypeError, RuntimeError, AttributeError, IndexError)


class Stateful(Protocol):
    """What a checkpoint is made of: a module, an optimizer, a `TrainingLoop`."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state: tensors, numbers, text, lists and dicts."""

    def load_state_dict(self, state: dict[str, Any], /) -> Any:
        """Take a state over."""


def save_checkpoint(path: str | Path, source: Stateful, comm: Communicator) -> None:
    """Write the state of rank 0's `source` to a file. Every rank must call.

    A file that is there is replaced in one moment: whatever happens, the old or the new one is there, and
    whole.

    Args:
        path: Of the file, which matters on rank 0 only; its folder must exist.
        source: Equal on all ranks.
        comm: Whose ranks work together.

    Raises:
        CheckpointError: The file could not be written; on every rank. A file that was there is untouched.
    """
    problem = None
    if comm.rank == 0:
        try:
            write_state(Path(path), source.state_dict())
        except CheckpointError as error:
            problem = str(error)
    problem = comm.broadcast_obj(problem)
    if problem is not None:
        raise CheckpointError(problem)


def load_checkpoint(path: str | Path, target: Stateful, comm: Communicator) -> None:
    """Give all ranks' `target` the state in a file, which only rank 0 has to have. Every rank must call.

    Args:
        path: Of a file that `save_checkpoint` wrote, at any number of ranks.
        target: Equal on all ranks; untouched if the state does not fit.
        comm: Whose ranks work together.

    Raises:
        CheckpointError: There is no such file, it is damaged or no checkpoint, or its state does not fit; on
            every rank. The message names the file.
    """
    path = Path(path)
    payload = _share_payload(path, comm)
    before = copy.deepcopy(target.state_dict())
    problem = _try_to_load(path, payload, target)
    problems = [text for text in comm.allgather_obj(problem) if text is not None]
    if problems:
        target.load_state_dict(before)
        raise CheckpointError(problems[0])


def _share_payload(path: Path, comm: Communicator) -> bytes:
    payload, problem = b"", None
    if comm.rank == 0:
        try:
            payload = read_payload(path)
        except CheckpointError as error:
            problem = str(error)
    length, problem = comm.broadcast_obj((len(payload), problem))
    if problem is not None:
        raise CheckpointError(problem)
    # As an array and not as an object: a model may be large.
    shared = np.frombuffer(bytearray(payload), np.uint8) if comm.rank == 0 else np.empty(length, np.uint8)
    comm.broadcast_(shared)
    return shared.tobytes()


def _try_to_load(path: Path, payload: bytes, target: Stateful) -> str | None:
    try:
        target.load_state_dict(parse_state(path, payload))
    except CheckpointError as error:
        return str(error)
    except _MISFITS as error:
        detail = f"{type(error).__name__}: {error}"
        return f"checkpoint {path}: does not fit ({detail}); name a file of the same model and data"
    return None
