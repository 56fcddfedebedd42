"""The modules below `horovod`, as scripts import them."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("torch")

import mpitrain.torch
from mpitrain.horovod import install
from mpitrain.horovod.modules import MODULES
from tests.support.jobs import REPOSITORY, run_python


@pytest.fixture(autouse=True)
def _installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    install()
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "horovod"]:
        del sys.modules[name]


@pytest.mark.parametrize("name", MODULES)
def test_every_module_has_the_names_of_what_it_stands_for(name: str) -> None:
    module = importlib.import_module(name)
    assert importlib.import_module(name) is module
    assert module.__name__ == name
    source = MODULES[name]
    if source is not None:
        original = importlib.import_module(source)
        assert module.__all__ == original.__all__
        assert {key: getattr(module, key) for key in module.__all__} == {
            key: getattr(original, key) for key in original.__all__
        }


def test_functions_and_classes_are_the_same_wherever_they_are_imported_from() -> None:
    torch_face = importlib.import_module("horovod.torch")
    assert torch_face.allreduce is mpitrain.torch.allreduce
    assert importlib.import_module("horovod.torch.mpi_ops").Average is torch_face.Average
    assert importlib.import_module("horovod.torch.compression").Compression is torch_face.Compression
    assert importlib.import_module("horovod.torch.functions").broadcast_object is torch_face.broadcast_object
    assert importlib.import_module("horovod.torch.optimizer").DistributedOptimizer is torch_face.DistributedOptimizer
    assert importlib.import_module("horovod.common.process_sets").ProcessSet is torch_face.ProcessSet
    exceptions = importlib.import_module("horovod.common.exceptions")
    assert exceptions.HorovodInternalError is torch_face.HorovodInternalError
    assert issubclass(exceptions.HostsUpdatedInterrupt, RuntimeError)
    assert issubclass(exceptions.HorovodVersionMismatchError, ImportError)


def test_the_top_module_has_a_version_and_no_launcher() -> None:
    horovod = importlib.import_module("horovod")
    assert horovod.__version__ == "0.28.1"
    assert importlib.util.find_spec("horovod.torch") is not None
    with pytest.raises(RuntimeError, match=r"horovod\.run: is not available; .* start it with `mpirun"):
        horovod.run(print, np=2)


@pytest.mark.parametrize("name", ["horovod.tensorflow", "horovod.runner", "horovod.torch.nowhere", "horovod.run"])
def test_what_is_not_here_says_so(name: str) -> None:
    with pytest.raises(ModuleNotFoundError, match=f"No module named '{name}': mpitrain stands in for") as caught:
        importlib.import_module(name)
    assert caught.value.name == name


def test_another_horovod_is_not_mixed_with_this_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "horovod.py").write_text("")
    for name in [name for name in sys.modules if name.partition(".")[0] == "horovod"]:
        del sys.modules[name]
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ImportError, match=r"another one comes before that of mpitrain, got .*horovod\.py"):
        install()


def test_what_scripts_ask_of_the_library() -> None:
    util = importlib.import_module("horovod.common.util")
    assert (util.mpi_built(), util.gloo_built(verbose=True), util.nccl_built(), util.ddl_built(), util.ccl_built()) == (
        True,
        False,
        0,
        False,
        False,
    )
    assert (util.extension_available("torch"), util.extension_available("mxnet")) == (True, False)
    assert not util.gpu_available("torch")
    util.check_extension("horovod.torch", "HOROVOD_WITH_PYTORCH", "here", "mpi_lib_v2")
    with pytest.raises(ImportError, match=r"horovod\.tensorflow: is not there, only horovod\.torch is"):
        util.check_extension("horovod.tensorflow", "HOROVOD_WITH_TENSORFLOW", "here", "mpi_lib")
    assert [size for size in range(10) if util.num_rank_is_power_2(size)] == [1, 2, 4, 8]
    assert util.split_list([1, 2, 3, 4, 5], 3) == [[1, 2], [3, 4], [5]]
    assert util.split_list([], 2) == [[], []]
    assert (util.is_iterable("abc"), util.is_iterable(iter(())), util.is_iterable(3)) == (True, True, False)


WORKERS = """
import torch
import horovod.torch as hvd

class Squares(torch.utils.data.Dataset):
    def __len__(self):
        return 5

    def __getitem__(self, index):
        return hvd.Compression.fp16.compress(torch.tensor(float(index**2)))[0]

if __name__ == "__main__":
    import horovod
    hvd.init()
    for method in ("fork", "spawn", "forkserver"):
        loader = torch.utils.data.DataLoader(Squares(), num_workers=1, multiprocessing_context=method)
        print(method, torch.cat(list(loader)).tolist(), horovod.__version__)
"""


def test_an_installed_horovod_is_not_seen_in_the_process_nor_in_workers_of_its_loaders(tmp_path: Path) -> None:
    installed = tmp_path / "installed" / "horovod"
    installed.mkdir(parents=True)
    (installed / "__init__.py").write_text("raise AssertionError('the other horovod')")
    (tmp_path / "train.py").write_text(WORKERS)
    path = f"{REPOSITORY}{os.pathsep}{installed.parent}"
    done = run_python("-m", "mpitrain.horovod", "train.py", folder=tmp_path, PYTHONPATH=path)
    assert done.returncode == 0, done.stderr
    expected = [f"{method} [0.0, 1.0, 4.0, 9.0, 16.0] 0.28.1" for method in ("fork", "spawn", "forkserver")]
    assert done.stdout.splitlines() == expected
