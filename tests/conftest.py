"""What all tests share: the same random examples on every rank, at every desk and in CI."""

from __future__ import annotations

import pytest
from hypothesis import settings

from tests.support.fake_cupy import stand_in

# Ranks that drew different examples would wait for one another for ever, and a failure in CI should be one at
# the desk. Deadlines are left to pytest-timeout: ranks that share a core are slow by turns.
settings.register_profile("mpitrain", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("mpitrain")


@pytest.fixture
def fake_cupy():
    """Put a stand-in in the place of CuPy, whose device memory lies on the host."""
    with stand_in() as cupy:
        yield cupy
