"""A stand-in for CuPy: device memory that lies on the host, and streams that are as late as real ones.

In a test, the fixture `fake_cupy` puts it in place of CuPy; a started process gets it by `environment()`.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import pathlib
import sys
import threading
from collections.abc import Iterator
from types import ModuleType
from typing import Any

__all__ = ["FOLDER", "environment", "held_up", "stand_in"]

FOLDER = pathlib.Path(__file__).parent


@contextlib.contextmanager
def stand_in(**configuration: object) -> Iterator[ModuleType]:
    """Import the stand-in as `cupy`, with a machine of its own, for as long as the block lasts.

    Args:
        configuration: Attributes of `Configuration`, such as `num_devices`.
    """
    before = {name: module for name, module in sys.modules.items() if _is_cupy(name)}
    for name in before:
        del sys.modules[name]
    sys.path.insert(0, str(FOLDER))
    try:
        module = importlib.import_module("cupy")
        for name, value in configuration.items():
            setattr(module._machine.machine.configuration, name, value)
        try:
            yield module
        finally:
            module._machine.machine.close()
    finally:
        sys.path.remove(str(FOLDER))
        for name in [name for name in sys.modules if _is_cupy(name)]:
            del sys.modules[name]
        sys.modules.update(before)


@contextlib.contextmanager
def held_up(module: ModuleType, stream: Any) -> Iterator[None]:
    """Let what is queued on a stream of the stand-in wait until the end of the block, as for a rank that has died."""
    over = threading.Event()
    machine = module._machine.machine
    machine.enqueue(machine.queue(stream.ptr, stream.device_id), lambda: None, over.is_set)
    try:
        yield
    finally:
        over.set()


def environment(**values: str) -> dict[str, str]:
    """Return the environment of a process that finds the stand-in, with variables such as `STAND_IN_DEVICES`."""
    path = os.pathsep.join([str(FOLDER), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, **values}


def _is_cupy(name: str) -> bool:
    return name == "cupy" or name.startswith("cupy.")
