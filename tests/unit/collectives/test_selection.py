from __future__ import annotations

import pytest

from mpitrain.collectives.selection import Available, check_algorithm, choose_num_segments, known_algorithms
from mpitrain.schedules import ALGORITHMS


@pytest.mark.parametrize("collective", ALGORITHMS)
def test_what_is_known_depends_on_what_there_is(collective):
    schedules = ["auto", *ALGORITHMS[collective]]
    assert known_algorithms(collective, Available(has_native=False)) == schedules
    assert set(known_algorithms(collective, Available())) == {*schedules, "native"}
    with_shared = set(known_algorithms(collective, Available(shared="direct")))
    one_exchange = ("allgather", "broadcast", "reduce", "reduce_scatter")
    assert ("direct" in with_shared) == (collective in ("allreduce", *one_exchange))
    assert ("hierarchical" in known_algorithms(collective, Available(shared="hierarchical"))) == (
        collective == "allreduce"
    )


@pytest.mark.parametrize("name", ["native", "bogus", "", "Ring", "direct"])
def test_unknown_algorithm_is_refused_with_the_list(name):
    with pytest.raises(ValueError, match=r"algorithm of allreduce: unknown, got .*; use one of auto, ring"):
        check_algorithm("allreduce", name, Available(has_native=False))


@pytest.mark.parametrize(
    ("nbytes", "expected"), [(0, 1), (99, 1), (100, 1), (199, 1), (200, 2), (1000, 10), (10**9, 64)]
)
def test_segments_are_about_as_long_as_the_setting(nbytes, expected):
    assert choose_num_segments(nbytes, 100) == expected
