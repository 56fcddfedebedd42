"""Settings from the environment."""

from __future__ import annotations

import importlib.metadata

import pytest

from mpitrain.config import Settings, quiet_mpi_wheel


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
    ],
)
def test_unusable_value_is_refused_by_the_name_of_its_variable(name: str, value: str) -> None:
    with pytest.raises(ValueError, match=f"MPITRAIN_{name}: .*, got '{value}'; correct or unset"):
        Settings.from_environ({f"MPITRAIN_{name}": value})


def test_the_wheel_of_open_mpi_is_quieted_unless_somebody_chose(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "distribution", lambda _name: object())
    environ: dict[str, str] = {}
    quiet_mpi_wheel(environ)
    assert environ == {"OMPI_MCA_osc": "^ucx"}
    chosen = {"OMPI_MCA_osc": "rdma"}
    quiet_mpi_wheel(chosen)
    assert chosen == {"OMPI_MCA_osc": "rdma"}


def test_the_mpi_of_a_site_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> object:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    environ: dict[str, str] = {}
    quiet_mpi_wheel(environ)
    assert environ == {}
