from __future__ import annotations

import hashlib
import io
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from mpitrain.collectives import Communicator
from mpitrain.errors import CheckpointError
from mpitrain.training import checkpoint_file, load_checkpoint, save_checkpoint
from tests.support.limits import HANG_S
from tests.support.ranks import outcome, run_communicators

SIZE = 3
# Ranks are threads here, and have one random generator.
SEEDING = threading.Lock()


def make_model(seed: int, *widths: int) -> torch.nn.Sequential:
    with SEEDING:
        torch.manual_seed(seed)
        return torch.nn.Sequential(*(torch.nn.Linear(*pair) for pair in pairwise(widths or (3, 4, 2))))


def same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    states = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(*pair) for pair in states)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "model.ckpt"
    run_communicators(SIZE, lambda comm: save_checkpoint(path, make_model(comm.rank), comm))
    return path


def errors_of_loading(path: Path, make_target: Callable[[], Any] = lambda: make_model(9)) -> list[str]:
    """Load on all ranks; every rank must get an error and keep what it had. Return the messages."""

    def body(comm: Communicator) -> object:
        target, untouched = make_target(), make_target()
        error = outcome(lambda: load_checkpoint(path, target, comm))
        assert same(target, untouched)
        return error

    content = path.read_bytes() if path.is_file() else None
    files = sorted(path.parent.iterdir())
    errors = run_communicators(SIZE, body)
    assert [type(error) for error in errors] == [CheckpointError] * SIZE
    assert all(str(path) in str(error) for error in errors)
    assert content == (path.read_bytes() if path.is_file() else None)
    assert sorted(path.parent.iterdir()) == files
    return [str(error) for error in errors]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_all_ranks_get_what_rank_0_saved_and_only_rank_0_needs_the_file(saved, size) -> None:
    def body(comm: Communicator) -> torch.nn.Module:
        target = make_model(5 + comm.rank)
        load_checkpoint(saved if comm.rank == 0 else saved.with_name("none"), target, comm)
        return target

    for target in run_communicators(size, body):
        assert same(target, make_model(0))


def test_saving_again_replaces_the_file_and_leaves_nothing_else(saved) -> None:
    def body(comm: Communicator) -> torch.nn.Module:
        save_checkpoint(saved, make_model(7), comm)
        target = make_model(1)
        load_checkpoint(saved, target, comm)
        return target

    assert all(same(target, make_model(7)) for target in run_communicators(SIZE, body))
    assert list(saved.parent.iterdir()) == [saved]


def test_a_symbolic_link_stays_one(saved) -> None:
    link = saved.with_name("latest")
    link.symlink_to(saved)
    run_communicators(1, lambda comm: save_checkpoint(link, make_model(3), comm))
    assert link.is_symlink()
    target = make_model(1)
    run_communicators(1, lambda comm: load_checkpoint(saved, target, comm))
    assert same(target, make_model(3))


@pytest.mark.parametrize("part", [0.0, 0.001, 0.01, 0.03, 0.5, 0.999])
def test_a_truncated_file_is_an_error_on_every_rank(saved, part) -> None:
    content = saved.read_bytes()
    saved.write_bytes(content[: int(len(content) * part)])
    assert any(word in errors_of_loading(saved)[0] for word in ("not whole", "first bytes"))


@pytest.mark.parametrize("part", [0.0, 0.012, 0.02, 0.03, 0.1, 0.5, 0.9999])
def test_a_changed_byte_is_an_error_on_every_rank(saved, part) -> None:
    content = bytearray(saved.read_bytes())
    content[int(len(content) * part)] ^= 0x10
    saved.write_bytes(content)
    errors_of_loading(saved)


def test_bytes_that_were_appended_are_an_error(saved) -> None:
    saved.write_bytes(saved.read_bytes() + b"more")
    assert "is not whole" in errors_of_loading(saved)[0]


def test_a_foreign_file_is_an_error(saved) -> None:
    torch.save(make_model(0).state_dict(), saved)
    assert "is not a checkpoint of mpitrain" in errors_of_loading(saved)[0]
    saved.write_text("weights\n" * 100)
    assert "is not a checkpoint of mpitrain" in errors_of_loading(saved)[0]


def test_a_file_that_is_not_there_is_an_error(tmp_path) -> None:
    assert "cannot be read" in errors_of_loading(tmp_path / "none")[0]
    assert "cannot be read" in errors_of_loading(tmp_path)[0]


def with_header(payload: bytes, version: int = 1) -> bytes:
    digest = hashlib.sha256(payload).digest()
    return checkpoint_file._HEADER.pack(checkpoint_file._MAGIC, version, len(payload), digest) + payload


def test_a_newer_format_is_an_error(saved) -> None:
    saved.write_bytes(with_header(b"whatever", version=2))
    assert "has format version 2, and this installation reads 1" in errors_of_loading(saved)[0]


class _Malice:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


# torch warns of pickles that it does not like, before it refuses them.
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_nothing_in_a_file_is_executed(saved) -> None:
    trace = saved.with_name("trace")
    buffer = io.BytesIO()
    torch.save({"model": _Malice(trace)}, buffer)
    for payload in (buffer.getvalue(), pickle.dumps(_Malice(trace))):
        saved.write_bytes(with_header(payload))
        assert "cannot be read" in errors_of_loading(saved)[0]
    assert not trace.exists()


@pytest.mark.parametrize(
    "make_target",
    [
        lambda: make_model(9, 3, 5, 2),
        lambda: make_model(9, 3, 4),
        lambda: make_model(9, 3, 4, 2, 2),
        lambda: make_model(9, 3, 4, 3),
    ],
    ids=["wider", "shorter", "longer", "another end"],
)
def test_a_state_that_does_not_fit_is_an_error_and_changes_nothing(saved, make_target) -> None:
    assert "does not fit" in errors_of_loading(saved, make_target)[0]


def test_a_misfit_on_one_rank_is_an_error_on_every_rank(saved) -> None:
    def body(comm: Communicator) -> object:
        width = 4 + (comm.rank == 1)
        target = make_model(9, 3, width, 2)
        error = outcome(lambda: load_checkpoint(saved, target, comm))
        assert same(target, make_model(9, 3, width, 2))
        return error

    errors = run_communicators(SIZE, body)
    assert [type(error) for error in errors] == [CheckpointError] * SIZE


def errors_of_saving(path: Path, source: Any) -> list[str]:
    errors = run_communicators(SIZE, lambda comm: outcome(lambda: save_checkpoint(path, source, comm)))
    assert [type(error) for error in errors] == [CheckpointError] * SIZE
    assert all(str(path) in str(error) for error in errors)
    return [str(error) for error in errors]


def test_a_folder_that_is_not_there_is_an_error_on_every_rank(tmp_path) -> None:
    assert "cannot be written" in errors_of_saving(tmp_path / "none" / "model.ckpt", make_model(0))[0]


def test_a_full_disk_is_an_error_on_every_rank_and_leaves_the_old_file(saved, monkeypatch) -> None:
    content = saved.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert "No space left" in errors_of_saving(saved, make_model(8))[0]
    assert list(saved.parent.iterdir()) == [saved]
    assert saved.read_bytes() == content


def test_what_could_not_be_read_again_is_not_written(saved) -> None:
    class Source:
        def state_dict(self) -> dict[str, Any]:
            return {"deep": [{"path": Path("x")}]}

    content = saved.read_bytes()
    assert "cannot hold" in errors_of_saving(saved, Source())[0]
    assert saved.read_bytes() == content


CRASH = """
import os, pathlib, sys, torch
from mpitrain.training.checkpoint_file import write_state
path = pathlib.Path(sys.argv[1])
if sys.argv[2] == "rename":
    pathlib.Path.replace = lambda *_: os._exit(9)
else:
    os.fsync = lambda _: os._exit(9)
write_state(path, {"weight": torch.ones(100_000)})
"""


@pytest.mark.parametrize("moment", ["write", "rename"])
def test_a_crash_before_the_rename_leaves_the_old_file(saved, moment) -> None:
    content = saved.read_bytes()
    done = subprocess.run([sys.executable, "-c", CRASH, str(saved), moment], timeout=HANG_S, check=False)
    assert done.returncode == 9
    # The crash came late enough: the new content was in the folder.
    assert any(path.stat().st_size > 400_000 for path in saved.parent.iterdir() if path != saved) or moment == "write"
    assert saved.read_bytes() == content
    target = make_model(1)
    run_communicators(1, lambda comm: load_checkpoint(saved, target, comm))
    assert same(target, make_model(0))
