"""The wheel carries the sources of the kernels inside the package, where the loader looks first."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
PRINT_TEXT = (
    "from mpitrain.memory.device.kernels import loader, source_text; "
    "print(loader.__file__); print(source_text('reduce_peers'))"
)

pytest.importorskip("hatchling")


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    """Build the wheel and unpack it."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True)
    (wheel,) = folder.glob("mpitrain-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def test_wheel_carries_all_sources(unpacked):
    sources = {path.name: path.read_bytes() for path in (REPOSITORY / "kernels").iterdir()}
    assert any(name.endswith(".cu") for name in sources)
    assert {path.name: path.read_bytes() for path in (unpacked / "mpitrain" / "_kernels").iterdir()} == sources


def test_wheel_carries_the_package_and_nothing_else(unpacked):
    folders = {path.name.partition("-")[0] for path in unpacked.iterdir()}
    assert folders == {"mpitrain"}


def test_loader_of_the_wheel_reads_its_own_sources(unpacked):
    marked = unpacked / "mpitrain" / "_kernels" / "reduce_peers.cu"
    marked.write_text("// of the wheel\n" + marked.read_text())
    done = subprocess.run([sys.executable, "-c", PRINT_TEXT], cwd=unpacked, check=True, capture_output=True, text=True)
    where, mark, *_ = done.stdout.splitlines()
    assert Path(where).is_relative_to(unpacked)
    assert mark == "// of the wheel"
