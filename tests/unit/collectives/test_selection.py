from __future__ import annotations

import pytest

from mpitrain.collectives import selection
from mpitrain.collectives.selection import Available, choose_algorithm, choose_num_segments, known_algorithms
from mpitrain.schedules import ALGORITHMS

SIZES = [0, 1, 1000, 64 << 10, (64 << 10) + 1, 256 << 10, 1 << 20, (1 << 20) + 1, 1 << 30]


@pytest.mark.parametrize("collective", ALGORITHMS)
@pytest.mark.parametrize("nbytes", SIZES)
def test_choice_is_always_one_of_the_known(collective, nbytes):
    for has_native in (True, False):
        name = choose_algorithm(collective, "auto", nbytes, Available(has_native))
        assert name in known_algorithms(collective, Available(has_native))
        assert name != "auto"
        if not has_native:
            assert name in ALGORITHMS[collective]


@pytest.mark.parametrize("collective", ALGORITHMS)
def test_named_algorithm_is_taken_at_any_size(collective):
    for name in ALGORITHMS[collective]:
        assert {choose_algorithm(collective, name, nbytes, Available()) for nbytes in SIZES} == {name}


def test_small_buffers_are_for_the_mpi_library():
    assert choose_algorithm("allreduce", "auto", 1000, Available()) == selection.NATIVE
    assert choose_algorithm("allreduce", "auto", 1 << 30, Available()) == "ring"


@pytest.mark.parametrize("name", ["native", "bogus", "", "Ring"])
def test_unknown_algorithm_is_refused_with_the_list(name):
    with pytest.raises(ValueError, match=r"algorithm of allreduce: unknown, got .*; use one of auto, ring"):
        choose_algorithm("allreduce", name, 10, Available(has_native=False))


@pytest.mark.parametrize(
    ("nbytes", "expected"), [(0, 1), (99, 1), (100, 1), (199, 1), (200, 2), (1000, 10), (10**9, 64)]
)
def test_segments_are_about_as_long_as_the_setting(nbytes, expected):
    assert choose_num_segments(nbytes, 100) == expected
