"""The file of a checkpoint: a header that tells whether the rest is whole, then what `torch.save` writes.

    bytes       content
    20          "mpitrain checkpoint" and a newline
    4           version of this format
    8           number of bytes that follow the header
    32          their SHA-256

Numbers are little-endian. No word here about ranks; see `mpitrain.training.checkpoint`.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import pickle
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mpitrain.errors import CheckpointError

__all__ = ["parse_state", "read_payload", "write_state"]

_MAGIC = b"mpitrain checkpoint\n"
_VERSION = 1
_HEADER = struct.Struct(f"<{len(_MAGIC)}sIQ32s")


def write_state(path: Path, state: Any) -> None:
    """Write a state so that at any moment the file at `path` is the old one or the new one, and whole.

    Raises:
        CheckpointError: The file could not be written; the old one is untouched.
    """
    _check_plain(path, state)
    # Through a symbolic link to the file that it stands for.
    path = path.resolve()
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        buffer = io.BytesIO()
        torch.save(state, buffer)
        payload = buffer.getbuffer()
        header = _HEADER.pack(_MAGIC, _VERSION, len(payload), hashlib.sha256(payload).digest())
        with temporary.open("wb") as file:
            file.write(header)
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        raise CheckpointError(
            f"checkpoint {path}: cannot be written ({error}); name a file in a folder that has room"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def read_payload(path: Path) -> bytes:
    """Return what follows the header of a file that is whole.

    Raises:
        CheckpointError: There is no such file, it is no checkpoint, or it is damaged.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"checkpoint {path}: cannot be read ({error}); name another file") from error
    if not content.startswith(_MAGIC) or len(content) < _HEADER.size:
        raise CheckpointError(f"checkpoint {path}: is not a checkpoint of mpitrain, or only its first bytes")
    _, version, length, digest = _HEADER.unpack_from(content)
    if version != _VERSION:
        raise CheckpointError(
            f"checkpoint {path}: has format version {version}, and this installation reads {_VERSION}; "
            "use the version of mpitrain that wrote it"
        )
    payload = content[_HEADER.size :]
    if len(payload) != length:
        raise CheckpointError(
            f"checkpoint {path}: is not whole, got {len(payload)} of {length} bytes; use an older one"
        )
    if hashlib.sha256(payload).digest() != digest:
        raise CheckpointError(
            f"checkpoint {path}: is corrupt, its bytes are not those that were written; use an older one"
        )
    return payload


def parse_state(path: Path, payload: bytes) -> Any:
    """Return the state in a payload; nothing in it is executed.

    Raises:
        CheckpointError: It cannot be read.
    """
    try:
        return torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, ValueError, EOFError) as error:
        raise CheckpointError(f"checkpoint {path}: has contents that cannot be read ({error})") from error


def _check_plain(path: Path, value: Any) -> None:
    # Anything else could be written, and then not be read again.
    if isinstance(value, Mapping):
        for key, item in value.items():
            _check_plain(path, key)
            _check_plain(path, item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            _check_plain(path, item)
    elif value is not None and not isinstance(value, (torch.Tensor, bool, int, float, str)):
        raise CheckpointError(
            f"checkpoint {path}: cannot hold {type(value).__qualname__}; "
            "let the state be made of tensors, numbers, text, lists and dicts"
        )


def _sync_folder(folder: Path) -> None:
    # Else a power failure may forget that the file was renamed.
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
